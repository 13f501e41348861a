"""`tide teachers show NAME`: an entry in words, and what loading it checks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import resolve
from teacher_cache.teachers.registry import find_teacher


def describe_teacher(name: str, teachers_file: Path | None = None) -> str:
    """Several lines about the teacher `name`; TideError where it is unknown."""
    entry = find_teacher(name, teachers_file)
    lines = [f"{name}: {entry.about}".rstrip(": ")]
    lines += [f"  {key:<16} {value}" for key, value in asdict(entry).items() if key != "about"]
    architecture = ARCHITECTURES.get(entry.architecture)
    if architecture is not None:
        lines.append(f"  {'loads as':<16} {architecture.stock_class}")
        lines += [f"  {'':<16} {old} → {new}" for old, new in architecture.renames.items()]
    lines.append(f"  {'weights':<16} {resolve(entry.model)}")
    lines.append("loading checks:")
    lines += [
        f"  config.json      model_type is {' or '.join(architecture.model_types) if architecture else 'known'}",
        f"  mask id          {entry.mask_id} in config.json (where it is given) and no ordinary token of the tokenizer",
        "  tokenizer        no larger than the embedding; has a chat template"
        + ("; of one family with the student's" if entry.student_tokens else ""),
        "  weights          safetensors, whole; every tensor used once, every parameter filled, every shape as said",
        "  positions        lengths fit the model's own limit",
    ]
    return "\n".join(lines)
