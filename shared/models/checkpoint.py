"""Checkpoints as they lie on a disk or the hub: config, safetensors files, fingerprint, mask."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from shared.system.files import TideError, read_json, refuse_odd, sha256_of
from shared.text.tokenizers import Tokenizer

AGAIN = "download the checkpoint again, from a place that you trust"
DEFAULT_MASK = "<|mask|>"  # added to a student's tokenizer that names none


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and safetensors weights, and what the config says."""

    folder: Path
    config: dict[str, Any]

    @property
    def embedding_rows(self) -> int:
        """How many ids the model knows, by its config. TideError where the config does not say."""
        rows = self.config.get("embedding_size") or self.config.get("vocab_size")
        if not isinstance(rows, int):
            raise TideError(f"the config of {self.folder} lacks vocab_size", fix=AGAIN)
        return rows

    def special_ids(self, role: str) -> list[int]:
        """The config's ids for `role` (`eos`, `pad`): none, one, or several."""
        value: Any = self.config.get(f"{role}_token_id")
        several = value if isinstance(value, list) else [value]
        return [] if value is None else [int(i) for i in several]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, all that an index names where there is one. TideError for none."""
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            try:
                names = sorted(set(_read_json(index)["weight_map"].values()))
                strange = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
            except (KeyError, TypeError, AttributeError) as error:
                raise TideError(f"{index} is no index of weights: {error}", fix=AGAIN) from error
            if strange or not names:
                named = repr(strange[0][:200]) if strange else "no file"
                beside = "safetensors files in the same folder"
                raise TideError(f"{index} names {named}", expected=beside, fix=AGAIN)
            files = [self.folder / name for name in names]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                what = f"{len(missing)} of {len(names)} weight files: {', '.join(missing[:5])}"
                raise TideError(f"{self.folder} lacks {what}", fix=AGAIN)
        else:
            files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickled = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            raise TideError(
                f"{self.folder} has no safetensors weights; pickled ones: {pickled or 'none'}",
                expected="model.safetensors, or shards with model.safetensors.index.json",
                fix="convert the weights to safetensors; pickles can run code and are never loaded",
            )
        for file in files:
            refuse_odd(file)
        return files

    def fingerprint(self) -> str:
        """A hash over the config and the bytes of all weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.weight_files:
            digest.update(bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()[:32]


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except TideError:
        raise
    except (OSError, ValueError) as error:
        raise TideError(f"{path} cannot be read: {error}", fix=AGAIN) from error


def resolve(location: str) -> str:
    """A path or hub id; for a run its model; for `embedded:NAME` the folder in the package."""
    if not location.startswith("embedded:"):
        folder, model = Path(location), Path(location) / "model"
        is_run = (model / "config.json").is_file() and not (folder / "config.json").exists()
        refuse_odd(model, folder if is_run else None)
        return str(model) if is_run else location
    package, _, name = location.removeprefix("embedded:").partition("/")
    return str(Path(str(resources.files(package))) / name)


def open_checkpoint(location: str, weights: bool = True) -> Checkpoint:
    """The checkpoint of a path, or of a hub id, fetched if need be with or without its weights."""
    folder = Path(location)
    if not folder.is_dir():
        if location.startswith((".", "/", "~")) or location.count("/") != 1:
            expected = "a checkpoint's folder, or a hub id OWNER/NAME"
            raise TideError(f"there is no folder {location!r}", expected=expected)
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
        patterns += ["*.safetensors"] if weights else []
        try:
            folder = Path(snapshot_download(location, allow_patterns=patterns))
        except Exception as error:  # the client raises many types, all about reaching the model
            raise TideError(
                f"{location} could not be fetched from the hub: {str(error).splitlines()[0]}",
                expected="a folder, or a hub id that can be reached",
                fix="check the name and the network, or give a folder (--model PATH)",
            ) from error
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise TideError(f"config.json of {folder} is no object", fix=AGAIN)
    return Checkpoint(folder, config)


def stated_mask(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int | None:
    """The mask id by config.json and tokenizer, which must agree; None where neither states one."""
    config = checkpoint.config.get("mask_token_id")
    named = getattr(tokenizer.backend, "mask_token_id", None)
    if config is not None and named is not None and int(config) != int(named):
        theirs, ours = (f"{i} ({_word(tokenizer, int(i))})" for i in (named, config))
        raise TideError(
            f"{checkpoint.folder} has mask_token_id {ours}, its tokenizer the mask token {theirs}",
            expected="one and the same id",
            fix="correct mask_token_id in config.json, or mask_token in tokenizer_config.json",
        )
    mask = config if config is not None else named
    if mask is None:
        return None
    refuse_as_mask(int(mask), tokenizer, checkpoint, str(checkpoint.folder))
    return int(mask)


def refuse_as_mask(
    mask_id: int, tokenizer: Tokenizer, checkpoint: Checkpoint | None, whose: str
) -> None:
    """TideError where the id cannot be a mask: it ends texts, or is an ordinary token."""
    ends = [] if checkpoint is None else checkpoint.special_ids("eos")
    words = tokenizer.token_bytes
    if mask_id in (*ends, getattr(tokenizer.backend, "eos_token_id", None)):
        problem = "also its end of text"
    elif mask_id < len(words) and mask_id not in tokenizer.added_ids and words[mask_id] != b"":
        problem = "an ordinary token of its tokenizer"
    else:
        return
    raise TideError(
        f"the mask id {mask_id} of {whose} is {problem}: {_word(tokenizer, mask_id)}",
        expected="a token of its own for the mask",
        fix="correct the mask id, or use the tokenizer that belongs to the checkpoint",
    )


def student_mask(tokenizer: Tokenizer, asked: str | None) -> tuple[str, int]:
    """The student's mask and its id: the one asked for, else the tokenizer's own, else `<|mask|>`.

    A missing token gets the id one past the vocabulary.
    """
    own = tokenizer.backend.mask_token
    if asked is not None and own is not None and asked != own:
        raise TideError(
            f"student_mask_token is {asked!r}, the mask of the tokenizer {tokenizer.name} {own!r}",
            expected="one and the same token",
            fix="leave student_mask_token out, or correct mask_token in tokenizer_config.json",
        )
    token = str(asked or own or DEFAULT_MASK)
    if token not in tokenizer.backend.get_vocab():
        return token, len(tokenizer)
    mask_id = tokenizer.special_id("mask", token)
    refuse_as_mask(mask_id, tokenizer, None, tokenizer.name)
    return token, mask_id


def _word(tokenizer: Tokenizer, index: int) -> str:
    inside = index < len(tokenizer)
    return repr(tokenizer.decode([index])) if inside else "no token of its tokenizer"
