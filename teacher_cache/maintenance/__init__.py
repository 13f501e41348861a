"""What one does with a finished cache: look at it, check it, share it, make another of it."""
