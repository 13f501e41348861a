"""Where rows come from: files, a folder or glob of them, the hub, the standard library.

Every row comes with its place, by which reports name it.
"""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.files import ENDINGS, Place, Raw, file_rows, is_data_file
from shared.data.stdlib_corpus import corpus_origin, iter_stdlib_functions
from shared.system.errors import TideError


def source_rows(source: str) -> Iterator[tuple[Place, Raw]]:
    """Every row of a source, with its place. TideError where it cannot be read."""
    if source.startswith("stdlib:"):
        split = source.removeprefix("stdlib:")
        if split not in ("train", "heldout", "all"):
            raise TideError(
                f"unknown split in {source!r}",
                expected="stdlib:train, stdlib:heldout or stdlib:all",
            )
        for name, messages in iter_stdlib_functions(split):
            yield f"{source}:{name}", {"messages": messages}
    elif source.startswith("hf://"):
        yield from _hub_rows(source.removeprefix("hf://"))
    else:
        path, split = _split_of(source)
        if _is_saved(path):
            yield from _saved_rows(path, split)
        else:
            for file in source_files(source):
                yield from file_rows(file)


def source_files(source: str) -> list[Path]:
    """The files that a source reads, in order; none for the hub and the standard library.

    TideError where none is there.
    """
    if source.startswith(("hf://", "stdlib:")):
        return []
    path, _ = _split_of(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        saved = _is_saved(path)
        files = sorted(p for p in path.rglob("*") if p.is_file() and (saved or is_data_file(p)))
        if not files:
            expected = f"files in {', '.join(ENDINGS)}"
            raise TideError(f"the folder {source} holds no data files", expected=expected)
        return files
    if glob.has_magic(source):
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]
        if files:
            return files
    raise TideError(
        f"there is no data file {source}",
        expected=f"a file ({', '.join(ENDINGS)}), a folder or a glob of them, hf://OWNER/NAME, or "
        "stdlib:train",
        fix="check the path given as data.source (--data)",
    )


def describe_source(source: str) -> str:
    """The source in words, with what it cannot say of itself."""
    return f"{source} ({corpus_origin()})" if source.startswith("stdlib:") else source


def public_name(source: str) -> str:
    """The source as others may read it: a path of this machine loses its folders."""
    kind = "hf://" if source.startswith("hf://") else ""
    name = source.removeprefix(kind)
    on_the_hub = kind and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if source.startswith("stdlib:") or on_the_hub:
        return source
    return kind + name.rstrip("/").rpartition("/")[2]


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote the folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _split_of(source: str) -> tuple[Path, str | None]:
    """`PATH#SPLIT` in two; a path that has a `#` of its own stays whole."""
    match = re.fullmatch(r"(.*)#([\w.\[\]:%-]+)", source)
    if match and not Path(source).exists():
        return Path(match[1]), match[2]
    return Path(source), None


def _saved_rows(folder: Path, split: str | None) -> Iterator[tuple[Place, Raw]]:
    datasets = _datasets()
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise TideError(
            f"{folder} could not be read by `datasets`: {reason}", fix="save it again"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise TideError(
                f"{folder} holds the splits {', '.join(rows)}",
                expected="the name of one",
                fix=f"write {folder}#{next(iter(rows))}",
            )
        rows = rows[split]
    for number, row in enumerate(rows, 1):
        yield f"{folder}:{number}", row


@dataclass(frozen=True)
class HubName:
    """`OWNER/NAME[:CONFIG][:SPLIT]` or `OWNER/NAME[:CONFIG]#SPLIT`, where SPLIT may be a slice such
    as `train[:95%]` and CONFIG may be `*`.
    """

    name: str
    parts: tuple[str, ...]
    split: str | None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """From what stands behind `hf://`. TideError where it names no data set."""
        place, _, split = text.partition("#")
        name, *parts = place.split(":")
        if not name or len(parts) > 2 or (split and len(parts) > 1):
            raise TideError(
                f"hf://{text} names no data set",
                expected="hf://OWNER/NAME[:CONFIG][:SPLIT] or …#SPLIT",
            )
        return cls(name, tuple(parts), split or None)


def _hub_rows(text: str) -> Iterator[tuple[Place, Raw]]:
    """Rows of a data set of the hub, streamed; a slice of a split is fetched whole."""
    wanted = HubName.parse(text)
    datasets = _datasets()
    try:
        configs, split = _configs_and_split(datasets, wanted)
        for config in configs:
            streaming = "[" not in split
            rows = datasets.load_dataset(wanted.name, config, split=split, streaming=streaming)
            place = f"hf://{wanted.name}" + (f":{config}" if config else "") + f"#{split}"
            for number, row in enumerate(rows, 1):
                yield f"{place}:{number}", row
    except TideError:
        raise
    except Exception as error:  # the library raises many types, most of them about the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TideError(
            f"hf://{text} could not be read: {reason}",
            expected="a data set on the hub: hf://OWNER/NAME, hf://OWNER/NAME:CONFIG:SPLIT or "
            "hf://OWNER/NAME#train[:95%]",
            fix="check name, configuration, split and network, or download the data and give its "
            "path",
        ) from error


def _configs_and_split(datasets: Any, wanted: HubName) -> tuple[list[str | None], str]:
    """The configurations to read, and the split.

    A single part names a configuration where the data set has one of that name, else a split.
    """
    match wanted.parts:
        case (config, split) if config != "*":
            return [config], split
        case ("*", *rest):
            configs = datasets.get_dataset_config_names(wanted.name)
            return configs, wanted.split or (rest[0] if rest else "train")
    configs = datasets.get_dataset_config_names(wanted.name)
    if wanted.parts and (wanted.split is not None or wanted.parts[0] in configs):
        return [wanted.parts[0]], wanted.split or "train"
    split = wanted.parts[0] if wanted.parts else wanted.split or "train"
    if len(configs) > 1 and "default" not in configs:
        names = ", ".join(configs[:20])
        raise TideError(
            f"hf://{wanted.name} has {len(configs)} configurations and no default: {names}",
            expected="the name of one",
            fix=f"write hf://{wanted.name}:{configs[0]}, or hf://{wanted.name}:* for all of them",
        )
    return [None], split


def _datasets() -> Any:
    import datasets
    from datasets.utils import logging

    logging.set_verbosity_error()
    return datasets
