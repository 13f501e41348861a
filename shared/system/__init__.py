"""Files, locks, signals, hardware, errors."""
