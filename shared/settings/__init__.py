"""Settings as frozen dataclasses, read from TOML."""
