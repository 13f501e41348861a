"""Stage one: the teacher run once, its knowledge written to shards."""
