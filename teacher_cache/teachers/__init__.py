"""The known teachers, and how their checkpoints become stock transformers models."""
