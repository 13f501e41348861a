"""Chats as people have them: every form and kind of file, as one sequence of conversations."""

from shared.data.conversation import ChatExample, content_key
from shared.data.reading import BadRow, DataSummary, iter_examples, scan
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
