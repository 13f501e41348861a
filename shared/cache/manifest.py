"""The cache's manifest: what it is, and a fingerprint of all that its values depend on (DESIGN §6).

A cache may grow (more draws) but never mix: another fingerprint is refused with a diff of what differs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.cache.manifest_rules import problem_in
from shared.cache.row import SCHEMA_VERSION, Layout
from shared.cache.shards import Unit, finished_units
from shared.cache.vocabulary import load_vocabulary
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.files import read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """`fingerprint` is nested; every leaf takes part in the comparison. The rest describes and may grow."""

    fingerprint: dict[str, Any]
    draws: int
    parts: int
    examples: int
    schema_version: int = SCHEMA_VERSION
    sources: tuple[str, ...] = ()
    """Names of the data, for people: of a file the name alone. What is in them the fingerprint says."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the tail's mass is stored, rising."""
        return tuple(self.fingerprint["targets"]["temperatures"])

    @property
    def signals(self) -> tuple[str, ...]:
        """`topk`, `chunks` or both."""
        return tuple(self.fingerprint["targets"]["signals"])

    @property
    def shared_tokenizer(self) -> bool:
        """Whether the teacher read the student's ids."""
        return bool(self.fingerprint["teacher"]["student_tokens"])

    @property
    def partial(self) -> bool:
        """Whether the teacher may have been read at fewer positions than are masked, by a shared tokenizer."""
        return bool(self.fingerprint["targets"].get("partial", False))

    @property
    def digest(self) -> str:
        """A short hash of the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[
            :16
        ]

    def units(self) -> list[Unit]:
        """All units of a finished cache, draw by draw."""
        return [Unit(draw, part) for draw in range(self.draws) for part in range(self.parts)]

    def save(self, cache: Path) -> None:
        """Write `manifest.json` atomically, with a checksum over the rest of it. One that says the same stays."""
        content = (
            json.dumps({**asdict(self), "checksum": self.checksum}, indent=2, sort_keys=True) + "\n"
        ).encode()
        path = cache / MANIFEST
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)

    def layout(self, cache: Path) -> Layout:
        """How the shards of this cache, which lies in `cache`, are read. TideError where its table does not hold."""
        digest = self.fingerprint.get("tables")
        vocabulary = None if digest is None else load_vocabulary(cache, digest)
        return Layout(
            self.temperatures, self.fingerprint["targets"]["values"], vocabulary, self.partial
        )

    @property
    def checksum(self) -> str:
        """SHA-256 over everything that the manifest says."""
        return checksum_of(asdict(self))


def checksum_of(values: dict[str, Any]) -> str:
    """SHA-256 over everything that a manifest says, but its checksum."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_manifest(cache: Path) -> Manifest:
    """Read a cache's manifest. TideError where there is none, or it is damaged or of another version."""
    path = cache / MANIFEST
    try:
        values = read_json(path)
        checksum = values.pop("checksum", None)
        version = values.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 0 < version < 1000:
            raise ValueError("its schema_version is no version")
        if version == SCHEMA_VERSION:
            if checksum != checksum_of(values):
                raise ValueError("its checksum does not hold")
            if (problem := problem_in(values)) is not None:
                raise ValueError(problem)
            return Manifest(**{**values, "sources": tuple(values.get("sources", ()))})
    except FileNotFoundError as error:
        raise TideError(
            f"{cache} is no cache: it has no {MANIFEST}",
            fix="build one with `tide cache`, or check the path",
        ) from error
    except (TypeError, ValueError, AttributeError, OSError) as error:
        if isinstance(error, TideError):
            raise
        raise TideError(
            f"{path} is damaged: {str(error)[:500]}",
            fix=f"delete {path} and run the same `tide cache` command again; finished shards are kept",
        ) from error
    raise TideError(
        f"{cache} was written in schema version {version}",
        expected=f"version {SCHEMA_VERSION}",
        fix="build it again with `tide cache`, or use the version of this package that wrote it",
    )


def refuse_unfinished(cache: Path, manifest: Manifest) -> None:
    """TideError where a shard is not there yet."""
    missing = sorted(set(manifest.units()) - set(finished_units(cache)))
    if missing:
        raise TideError(
            f"{cache} lacks {len(missing)} of {len(manifest.units())} shards, the first is {missing[0].path(cache)}",
            expected="a finished cache",
            fix="run the same `tide cache` command again: it computes what is missing",
        )


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Lines `place: old → new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            inner = f"{place}.{key}" if place else str(key)
            lines += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
        return lines
    return [] if old == new else [f"{place}: {json.dumps(old)} → {json.dumps(new)}"]


def check_fingerprint(cache: Path, old: Manifest, new: dict[str, Any], purpose: str) -> None:
    """Raise TideError with a diff where `new` differs from the cache's fingerprint."""
    normal = json.loads(json.dumps(new))
    lines = differences(old.fingerprint, normal)
    if lines:
        raise TideError(
            f"{cache} was made with other settings (cache → now):\n    " + "\n    ".join(lines),
            expected=f"the settings of the cache, to {purpose}",
            fix="give back the old settings, or choose another folder (--out)",
        )
