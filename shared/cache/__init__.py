"""The format of a cache: rows, shards, identity, checks, stores."""
