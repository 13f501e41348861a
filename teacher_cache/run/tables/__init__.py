"""What a cache knows of the teacher's vocabulary as a whole, made once from a pilot sample before the first shard."""
