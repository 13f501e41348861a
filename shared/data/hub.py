"""Rows by the `datasets` library: from the hub, and from folders that `save_to_disk` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.system.errors import TideError


@dataclass(frozen=True)
class HubName:
    """`OWNER/NAME[:CONFIG][:SPLIT]` or `OWNER/NAME[:CONFIG]#SPLIT`, where SPLIT may be a slice such as
    `train[:95%]` and CONFIG may be `*`.
    """

    name: str
    parts: tuple[str, ...]
    split: str | None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """From what stands behind `hf://`."""
        place, _, split = text.partition("#")
        name, *parts = place.split(":")
        if not name or len(parts) > 2 or (split and len(parts) > 1):
            raise TideError(
                f"hf://{text} names no data set",
                expected="hf://OWNER/NAME[:CONFIG][:SPLIT] or …#SPLIT",
            )
        return cls(name, tuple(parts), split or None)


def hub_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set, streamed (a slice of a split is fetched whole). TideError where it cannot be reached."""
    wanted = HubName.parse(text)
    datasets = _library()
    try:
        configs, split = _configs_and_split(datasets, wanted)
        for config in configs:
            rows = datasets.load_dataset(
                wanted.name, config, split=split, streaming="[" not in split
            )
            place = f"hf://{wanted.name}" + (f":{config}" if config else "") + f"#{split}"
            for number, row in enumerate(rows, 1):
                yield f"{place}:{number}", row
    except TideError:
        raise
    except Exception as error:  # the library raises many types, most of them about the network
        raise TideError(
            f"hf://{text} could not be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            expected="a data set on the hub: hf://OWNER/NAME, hf://OWNER/NAME:CONFIG:SPLIT or hf://OWNER/NAME#train[:95%]",
            fix="check name, configuration, split and network, or download the data and give its path",
        ) from error


def _configs_and_split(datasets: Any, wanted: HubName) -> tuple[list[str | None], str]:
    """A single part is a configuration where the data set has one of that name, else a split; `*` means all."""
    if len(wanted.parts) == 2 and wanted.parts[0] != "*":
        return [wanted.parts[0]], wanted.parts[1]
    configs = datasets.get_dataset_config_names(wanted.name)
    if wanted.parts and wanted.parts[0] == "*":
        return configs, wanted.split or (wanted.parts[1] if len(wanted.parts) == 2 else "train")
    if wanted.parts and (wanted.split is not None or wanted.parts[0] in configs):
        return [wanted.parts[0]], wanted.split or "train"
    split = wanted.parts[0] if wanted.parts else wanted.split or "train"
    if len(configs) > 1 and "default" not in configs:
        raise TideError(
            f"hf://{wanted.name} has {len(configs)} configurations and no default: {', '.join(configs[:20])}",
            expected="the name of one",
            fix=f"write hf://{wanted.name}:{configs[0]}, or hf://{wanted.name}:* for all of them",
        )
    return [None], split


def saved_rows(folder: Path, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a folder that `save_to_disk` wrote."""
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise TideError(
            f"{folder} could not be read by `datasets`: {(str(error).splitlines() or [''])[0]}",
            fix="save it again",
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise TideError(
                f"{folder} holds the splits {', '.join(found)}",
                expected="the name of one",
                fix=f"write {folder}#{next(iter(found))}",
            )
        found = found[split]
    for number, row in enumerate(found, 1):
        yield f"{folder}:{number}", row


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def split_of(source: str) -> tuple[str, str | None]:
    """`PATH#SPLIT` in two; a path that has a `#` of its own stays whole."""
    match = re.fullmatch(r"(.*)#([\w.\[\]:%-]+)", source)
    return (match[1], match[2]) if match and not Path(source).exists() else (source, None)


def _library() -> Any:
    import datasets
    from datasets.utils import logging

    logging.set_verbosity_error()
    return datasets
