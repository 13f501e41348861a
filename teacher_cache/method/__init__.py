"""What the teacher sees, and what is kept of its logits."""
