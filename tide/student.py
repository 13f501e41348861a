"""A student that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.reading import waiting_messages
from shared.system.errors import TideError

if TYPE_CHECKING:
    from student_train.using.student import LoadedStudent

Chat = str | Sequence[dict[str, Any]]  # a question, or messages with `role` and `content`


@dataclass(frozen=True)
class Student:
    """A student in memory; `loaded` has its model and tokenizer."""

    place: str
    loaded: LoadedStudent = field(repr=False)

    def answer(self, chat: Chat, **sampling: Any) -> str:
        """The answer to one chat; settings as of `answers`."""
        return self.answers([chat], **sampling)[0]

    def answers(self, chats: Sequence[Chat], batch: int = 8, **sampling: Any) -> list[str]:
        """The answers to several, `batch` at a time. Settings of sampling by the names of
        docs/using.md: `new_tokens`, `threshold`, `steps_per_block`, `temperature`, `seed`, …
        """
        from student_train.using.settings import SampleConfig
        from student_train.using.student import choose_block

        if batch < 1:
            raise TideError(f"batch is {batch}", expected="at least 1")
        messages = []
        for chat in chats:
            asked = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
            messages.append(waiting_messages(asked))
        block = choose_block(sampling.get("block"), self.loaded)
        try:
            config = SampleConfig(**{**sampling, "block": block})
        except (TypeError, ValueError) as error:
            raise TideError(f"{error}", expected="settings of sampling (docs/using.md)") from error
        return list(self.loaded.answer(messages, config, batch))

    def log_likelihoods(
        self, context: str, continuations: Sequence[str], draws: int = 32
    ) -> list[float]:
        """Lower bounds of log p(continuation | context) in nats: the ELBO over `draws` masks."""
        from student_train.using.elbo import ElboConfig, log_likelihoods
        from student_train.using.student import choose_block

        encode = self.loaded.tokenizer.encode
        try:
            config = ElboConfig(draws=draws, block=choose_block(None, self.loaded))
            ids = encode([context])[0], encode(list(continuations))
            return log_likelihoods(self.loaded.model, *ids, self.loaded.special, config)
        except ValueError as error:
            raise TideError(str(error)) from error


def load_student(place: str | Path, device: str = "auto") -> Student:
    """A student from a folder (runs/NAME/model) or a hub id. TideError where it is none."""
    from student_train.using.student import load_for_use

    return Student(str(place), load_for_use(str(place), device))
