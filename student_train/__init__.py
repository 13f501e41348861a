"""Stage two: a student trained from the cache, with no teacher in memory."""
