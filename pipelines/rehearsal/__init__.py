"""Both stages run on tensors without content: what they need, before they have it."""
