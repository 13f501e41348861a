"""Rows rendered, tokenised and aligned once, in parts on disk that caches share."""
