"""Draws of (t, mask, split), and attention masks."""
