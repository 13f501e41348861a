"""What of a student goes to the hub: files that its users need, and a card with its scores and its licence.

Everything is looked at before anything is sent: the folder is loaded as whoever downloads it will load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pipelines.evaluation.results import read_scores
from pipelines.evaluation.table import score_table
from shared.system.errors import TideError
from shared.system.files import refuse_odd
from student_train.model.card import CARD, OWN_FOLDER
from student_train.using.load import load_for_use

_TAKEN = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
          "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "chat_template.jinja", CARD, "LICENSE*", "NOTICE*")  # fmt: skip
_LICENCE = "## Licence"
_BENCHMARKS = "## Benchmarks"


@dataclass(frozen=True)
class Contents:
    """Files by their name in the repository; the card as it will be; what is left out."""

    files: dict[str, Path]
    card: str
    left_out: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each, the card among them."""
        return {
            **{name: path.stat().st_size for name, path in self.files.items()},
            CARD: len(self.card.encode()),
        }


def gather(run: Path, name: str, licence: str | None) -> Contents:
    """Of a run, or of a student's folder; the repository will be called `name`. TideError where it is no student that
    others could use.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").is_file():
        raise TideError(
            f"{run} holds no finished student",
            expected="runs/NAME or runs/NAME/model of a run that has ended",
            fix="let `tide train` end, or check the path",
        )
    student = load_for_use(str(folder), "cpu")
    if student.tokenizer.backend.chat_template is None:
        raise TideError(
            f"the tokenizer of {folder} has no chat template", fix="save one with it: chats need it"
        )
    files, left_out = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TAKEN):
            refuse_odd(path)
            files[path.name] = path
        else:
            left_out.append(path.name)
    card = files.pop(CARD, None)
    if card is None:
        raise TideError(
            f"{folder} has no {CARD}, the card that says what the student is",
            fix="write one; `tide train` puts one beside the weights, and `tide export` takes it along",
        )
    scores = score_table(found) if (found := read_scores(folder.parent / "eval")) else None
    return Contents(files, _card(card, name, licence, scores), tuple(left_out))


def _card(path: Path, name: str, licence: str | None, scores: str | None) -> str:
    """With benchmark scores, unless it has some, and with the licence."""
    try:
        card: Any = ModelCard(path.read_text())
    except Exception as error:  # of the YAML in front
        raise TideError(
            f"{path} is no model card: {(str(error).splitlines() or ['?'])[0]}",
            fix="mend the lines between `---`",
        ) from error
    text = card.text.replace(OWN_FOLDER, name)
    if scores is not None and _BENCHMARKS not in text:
        before, found, after = text.partition(_LICENCE)
        text = f"{before.rstrip()}\n\n{_BENCHMARKS}\n\nMeasured with `tide eval`.\n\n{scores}\n\n{found}{after}"
    if licence is not None:
        card.data.license = licence
        text = f"{text.partition(_LICENCE)[0].rstrip()}\n\n{_LICENCE}\n\n{licence}\n"
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.strip()}\n"
