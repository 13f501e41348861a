"""`tide publish`: a student on the hub, in one commit: the files that its users need, and a card
with its scores and its licence. All is looked at before anything is sent.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipelines.evaluation.benchmarks import read_scores, score_table
from shared.models.checkpoint import resolve
from shared.system.files import TideError, refuse_odd
from student_train.export import CARD, OWN_FOLDER, SGLANG
from student_train.using.student import load_for_use

_SENT = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", SGLANG, "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What goes into a repository, by name: files, and the card as its text; what is left out."""

    files: dict[str, Path]
    card: str
    left_out: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each, the card among them."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return {**sizes, CARD: len(self.card.encode())}


def gather(run: Path, name: str, licence: str | None) -> Contents:
    """Of a run, or of a student's folder, for the repository `name`. TideError where it is no
    student that whoever downloads it could load.
    """
    folder = Path(resolve(str(run)))
    if not (folder / "config.json").is_file():
        expected = "runs/NAME or runs/NAME/model of a run that has ended"
        raise TideError(f"{run} holds no finished student", expected=expected)
    if load_for_use(str(folder), "cpu").tokenizer.backend.chat_template is None:
        raise TideError(f"the tokenizer of {folder} has no chat template", fix="save one with it")
    files, left_out = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SENT):
            refuse_odd(path, folder)
            files[path.name] = path
        elif path.name != CARD:
            left_out.append(path.name)
    # The card, with benchmark scores unless it has some, and with the licence
    refuse_odd(folder / CARD, folder)
    try:
        card: Any = ModelCard((folder / CARD).read_text())
    except Exception as error:  # it is missing, or the YAML in front is wrong
        what = f"{folder} has no {CARD}, the card that says what the student is: {error}"
        fix = "write one, or mend the lines between `---`; `tide train` puts one there"
        raise TideError(what, fix=fix) from error
    text = card.text.replace(OWN_FOLDER, name)
    about, *rest = re.split(r"^(?=## Licence\s*$)", text, maxsplit=1, flags=re.M)
    scores = read_scores(folder.parent / "eval")
    if scores and not re.search("^## Benchmarks", text, re.M):
        about = f"{about.rstrip()}\n\n## Benchmarks\n\nMeasured with `tide eval`.\n\n"
        about += f"{score_table(scores)}\n\n"
    if licence is not None:
        card.data.license = licence
        about, rest = f"{about.rstrip()}\n\n", [f"## Licence\n\n{licence}"]
    text = f"---\n{card.data.to_yaml()}\n---\n\n{''.join([about, *rest]).strip()}\n"
    return Contents(files, text, tuple(left_out))


def parse_target(target: str) -> str:
    """OWNER/NAME out of hf://OWNER/NAME. TideError where it is none."""
    name = target.removeprefix("hf://")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if not target.startswith("hf://") or name.count("/") != 1:
        raise TideError(f"{target!r} is no place for a model", expected="hf://OWNER/NAME")
    return name


def upload(contents: Contents, name: str, private: bool) -> str:
    """Send everything in one commit; its address. What is there already is not sent again.

    TideError where the hub cannot be reached, or refuses.
    """
    operations = [CommitOperationAdd(file, str(path)) for file, path in contents.files.items()]
    operations.append(CommitOperationAdd(CARD, contents.card.encode()))
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        said = "A student of tide-distill"
        return str(api.create_commit(name, operations, commit_message=said).commit_url)
    except Exception as error:  # of huggingface_hub, and of whatever it talks through
        first = (str(error).splitlines() or [type(error).__name__])[0]
        status = getattr(getattr(error, "response", None), "status_code", 0)
        fix = "check the network and HF_ENDPOINT, and run it again: what arrived is not sent again"
        if status in (401, 403):
            fix = "get a token that may write there: `hf auth login`, or set HF_TOKEN"
        raise TideError(f"the hub did not take {name}: {first}", fix=fix) from error
