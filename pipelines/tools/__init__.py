"""How the embedded teacher and its tokenizers were made."""
