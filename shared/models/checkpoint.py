"""Checkpoints as they lie on a disk or the hub: config, safetensors files, a fingerprint."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from shared.system.errors import TideError
from shared.system.files import read_json, refuse_odd

AGAIN = "download the checkpoint again, from a place that you trust"


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
        value = self.config.get(f"{role}_token_id")
        if value is None:
            return []
        return [int(i) for i in (value if isinstance(value, list) else [value])]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, all that an index names where there is one. TideError for none."""
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            files = _indexed(index)
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
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()[:32]


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        strange = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    except TideError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TideError(f"{index} is no index of weights: {error}", fix=AGAIN) from error
    if strange or not names:
        named = repr(strange[0][:200]) if strange else "no file"
        beside = "safetensors files in the same folder"
        raise TideError(f"{index} names {named}", expected=beside, fix=AGAIN)
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        what = f"{len(missing)} of {len(names)} weight files: {', '.join(missing[:5])}"
        raise TideError(f"{index.parent} lacks {what}", fix=AGAIN)
    return files


def resolve(location: str) -> str:
    """A path or hub id as it is; `embedded:NAME` as the folder inside the package."""
    if not location.startswith("embedded:"):
        return location
    package, _, name = location.removeprefix("embedded:").partition("/")
    return str(Path(str(resources.files(package))) / name)


def open_checkpoint(location: str, weights: bool = True) -> Checkpoint:
    """Find a checkpoint by path or hub id and read its config. TideError where there is none.

    From the hub it is fetched if need be, with or without its weights.
    """
    folder = Path(location)
    if "\0" in location or not folder.is_dir():
        if "\0" in location or location.startswith((".", "/", "~")) or location.count("/") != 1:
            raise TideError(
                f"there is no folder {location!r}",
                expected="a checkpoint's folder, or a hub id OWNER/NAME",
            )
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
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except TideError:
        raise
    except (OSError, ValueError) as error:
        raise TideError(f"{folder} has no readable config.json: {error}", fix=AGAIN) from error
    return Checkpoint(folder, config)
