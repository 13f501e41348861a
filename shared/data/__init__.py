"""Chats as people have them: every form and kind of file, as one sequence of conversations."""

from shared.data.conversation import BadRow, ChatExample, content_key
from shared.data.reading import DataSummary, iter_examples, scan
from shared.settings.config import DataConfig

__all__ = [
    "BadRow",
    "ChatExample",
    "DataConfig",
    "DataSummary",
    "content_key",
    "iter_examples",
    "scan",
]
