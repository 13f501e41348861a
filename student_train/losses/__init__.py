"""Pure functions on tensors, one value per position or chunk; reduction and division are the caller's."""
