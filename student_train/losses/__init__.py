"""The losses: pure functions on tensors. Division by counts is the caller's."""
