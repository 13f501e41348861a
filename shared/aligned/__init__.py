"""One conversation in two tokenisations."""
