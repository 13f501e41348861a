"""Chat templates and tokenizers."""
