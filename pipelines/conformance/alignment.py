"""Chunks of real texts between two real tokenizers: alignment.json, tokens in byte-level form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pipelines.conformance.result import Group, absent
from shared.aligned.alignment import Region, align_tokens
from shared.system.errors import TideError
from shared.text.bytes_of_tokens import byte_level_bytes


def alignment_groups(folder: Path) -> list[Group]:
    """One group; a case holds when all chunks are equal."""
    path = folder / "alignment.json"
    if not path.exists():
        return absent(path.name)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        group = Group(f"{document.get('teacher')} → {document.get('student')}")
        for case in document["cases"]:
            teacher, student = _lengths(case["teacher_tokens"]), _lengths(case["student_tokens"])
            region = Region(0, 0, int(min(teacher.sum(), student.sum())))
            group.add(
                float(align_tokens(teacher, student, [region]).tolist() != case["chunks"]), 0.0
            )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TideError(
            f"{path} has another layout: {error!r}", expected="cases with tokens and chunks"
        ) from error
    return [group]


def _lengths(tokens: list[str]) -> np.ndarray:
    decoded = [byte_level_bytes(token) for token in tokens]
    return np.array(
        [
            len(token.encode()) if b is None else len(b)
            for token, b in zip(tokens, decoded, strict=True)
        ]
    )
