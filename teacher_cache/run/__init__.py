"""A run of stage one: planned, carried out, watched."""
