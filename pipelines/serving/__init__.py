"""`tide serve`: a student behind an OpenAI-compatible interface."""
