"""What both stages agree on: data, tokens, alignment, noise, attention, the cache's format."""
