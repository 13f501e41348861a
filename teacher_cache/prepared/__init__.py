"""Data prepared once: rows rendered, tokenised for both sides and aligned, in parts on disk that caches share."""
