"""Recipes (TOML) and the command line, to settings and back."""
