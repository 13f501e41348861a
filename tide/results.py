"""What the stages leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.system.files import read_json

if TYPE_CHECKING:
    from shared.text.tokenizers import Tokenizer
    from teacher_cache.prepared.folder import PreparedData
    from tide.student import Student


@dataclass(frozen=True)
class Data:
    """Prepared data: rendered, tokenised and aligned. Shown, it is the report of what became of the rows."""

    folder: Path
    examples: int
    prepared: PreparedData = field(repr=False)
    student_tokenizer: Tokenizer = field(repr=False)

    def __str__(self) -> str:
        from teacher_cache.prepared.report import describe

        return describe(self.prepared)

    def show(self, count: int = 3) -> str:
        """The first examples as the student reads them, trained answers in ⟦ ⟧."""
        from teacher_cache.prepared.report import show

        return show(self.prepared.between(0, count), self.student_tokenizer)


@dataclass(frozen=True)
class Cache:
    """A finished cache."""

    folder: Path
    teacher: str
    examples: int
    draws: int

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """Of a folder. TideError where it holds none."""
        from shared.cache.manifest import load_manifest

        manifest = load_manifest(Path(folder))
        return cls(
            Path(folder), manifest.fingerprint.teacher.name, manifest.examples, manifest.draws
        )


@dataclass(frozen=True)
class Run:
    """A finished run of training."""

    folder: Path
    metrics: dict[str, float]

    @property
    def model(self) -> Path:
        """The student's folder, which transformers loads."""
        return self.folder / "model"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged curve, an entry a step that was logged or scored."""
        return list(read_json(self.folder / "history.json")["steps"])

    def student(self, device: str = "auto") -> Student:
        """Ready to answer."""
        from tide.student import load_student

        return load_student(self.model, device)
