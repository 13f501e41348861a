"""Many students at once: the demo, grids of variants and seeds."""
