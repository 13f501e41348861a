"""Manifests of strangers, each with a checksum that holds: one that cannot be is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shared.cache.manifest import checksum_of, load_manifest
from shared.system.errors import TideError

ABSENT = object()
HOSTILE: list[tuple[str, Any]] = [
    ("parts", 10**12), ("parts", -1), ("parts", "3"), ("parts", 0), ("draws", 101), ("draws", True),
    ("examples", None), ("schema_version", "4"), ("schema_version", 3), ("fingerprint", []),
    ("fingerprint.targets", ABSENT), ("fingerprint.targets.k", ABSENT), ("fingerprint.tables", 3),
    ("fingerprint.targets.temperatures", []), ("fingerprint.targets.temperatures", [float("nan")]),
    ("fingerprint.targets.temperatures", [1.0] * 10**5), ("fingerprint.targets.values", "pickle"),
    ("fingerprint.targets.partial", "yes"), ("fingerprint.lengths.block", 0),
    ("fingerprint.student.mask_id", 10**12), ("fingerprint.student.tokenizer", "x" * 10**6),
    ("fingerprint.teacher.attention", "full"), ("fingerprint.noise.demo_ratio", 7.0),
]  # fmt: skip


def test_manifests_that_cannot_be(caches: dict[str, Path], tmp_path: Path) -> None:
    for place, value in HOSTILE:
        values = load_manifest(caches["tiny-shared"]).to_json()
        *sections, name = place.split(".")
        inner: Any = values
        for section in sections:
            inner = inner[section]
        inner[name] = value
        if value is ABSENT:
            del inner[name]
        text = json.dumps({**values, "checksum": checksum_of(values)})
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(TideError):
            load_manifest(tmp_path)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    texts = (b"", b"null", b"[1]", b'{"draws": 1}', b"\xed\xa0\x80", b'{"a":' * 200_000)
    odd = [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)]
    for make in (*odd, *(lambda p, text=text: p.write_bytes(text) for text in texts)):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(TideError):
            load_manifest(tmp_path)
