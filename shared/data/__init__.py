"""Chats as people have them: every form and kind of file, as one sequence of conversations."""

from shared.data.conversation import ChatExample, content_key
from shared.data.reading import iter_examples, scan

__all__ = ["ChatExample", "content_key", "iter_examples", "scan"]
