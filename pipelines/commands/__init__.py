"""The commands of `tide`, a file for each part of the work. Heavy imports wait until a command needs them."""
