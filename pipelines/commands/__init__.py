"""The commands of `tide`. Heavy imports wait until a command has checked what it was given."""
