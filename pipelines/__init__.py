"""What a user runs: the command, recipes, the demo, reports."""
