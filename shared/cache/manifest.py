"""The cache's manifest: what it is, and the fingerprint of all that its values depend on.

A cache may grow (more draws) but never mix: another fingerprint is refused with a diff.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from shared.cache.fingerprint import Fingerprint, Name, differences
from shared.cache.row import SCHEMA_VERSION, Layout
from shared.cache.shards import Unit, finished_units
from shared.cache.vocabulary import load_vocabulary
from shared.settings.build import build, require, strict
from shared.system.errors import TideError
from shared.system.files import read_json, write_bytes

MANIFEST = "manifest.json"
_MOST_UNITS = 1_000_000


@strict
class Manifest:
    """Every leaf of `fingerprint` is compared. The rest describes, and `draws` may grow."""

    fingerprint: Fingerprint
    draws: Annotated[int, Field(ge=1, le=100)]
    parts: Annotated[int, Field(ge=0)]
    examples: Annotated[int, Field(ge=0, lt=1 << 50)]
    schema_version: int = SCHEMA_VERSION
    sources: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    """Names of the data, for people: of a file the name alone."""

    def __post_init__(self) -> None:
        size = f"{self.draws} draws of {self.parts} parts of {self.examples} examples"
        require(self.parts <= self.examples, f"{size} are no cache")
        require(self.parts > 0 or self.examples == 0, f"{size} are no cache")
        require(self.draws * self.parts <= _MOST_UNITS, f"{size} are too many shards")

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.fingerprint.targets.temperatures

    @property
    def signals(self) -> tuple[str, ...]:
        return self.fingerprint.targets.signals

    @property
    def shared_tokenizer(self) -> bool:
        return self.fingerprint.teacher.student_tokens

    @property
    def digest(self) -> str:
        return self.fingerprint.digest

    def units(self) -> list[Unit]:
        """All units of a finished cache, draw by draw."""
        return [Unit(draw, part) for draw in range(self.draws) for part in range(self.parts)]

    def layout(self, cache: Path) -> Layout:
        """How the shards in `cache` are read. TideError where its tables are others."""
        digest, targets = self.fingerprint.tables, self.fingerprint.targets
        vocabulary = None if digest is None else load_vocabulary(cache, digest)
        return Layout(targets.temperatures, targets.values, vocabulary, targets.partial)

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "draws": self.draws,
            "parts": self.parts,
            "examples": self.examples,
            "schema_version": self.schema_version,
            "sources": list(self.sources),
        }

    def save(self, cache: Path) -> None:
        """Write `manifest.json`, with a checksum over the rest; one that says the same stays."""
        values = self.to_json()
        values["checksum"] = checksum_of(values)
        content = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
        path = cache / MANIFEST
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def checksum_of(values: dict[str, Any]) -> str:
    """SHA-256 over everything that a manifest says, but its checksum."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_manifest(cache: Path) -> Manifest:
    """The manifest of a cache. TideError where there is none, or it is damaged or of another
    version.
    """
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
            manifest = build(Manifest, values, str(path))
            if checksum != checksum_of(manifest.to_json()):  # such as "8" where 8 belongs
                raise ValueError("it has values of the wrong type")
            return manifest
    except FileNotFoundError as error:
        raise TideError(
            f"{cache} is no cache: it has no {MANIFEST}",
            fix="build one with `tide cache`, or check the path",
        ) from error
    except (TypeError, ValueError, AttributeError, OSError) as error:
        problem = error.what if isinstance(error, TideError) else str(error)
        raise TideError(
            f"{path} is damaged: {problem[:500]}",
            fix=f"delete {path} and run the same `tide cache` command again; shards are kept",
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
            f"{cache} lacks {len(missing)} of {len(manifest.units())} shards, the first is "
            f"{missing[0].path(cache)}",
            expected="a finished cache",
            fix="run the same `tide cache` command again: it computes what is missing",
        )


def check_fingerprint(cache: Path, old: Fingerprint, new: Fingerprint, purpose: str) -> None:
    """Raise TideError with a diff where `new` differs from the fingerprint `old` of the cache."""
    lines = differences(old.to_json(), new.to_json())
    if lines:
        raise TideError(
            f"{cache} was made with other settings (cache → now):\n    " + "\n    ".join(lines),
            expected=f"the settings of the cache, to {purpose}",
            fix="give back the old settings, or choose another folder (--out)",
        )
