"""Many students over shared caches: ablations, and the demo."""
