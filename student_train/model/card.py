"""The README.md of a student's folder: what it is, how it was made, how it is used. For people, and for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from shared.cache.manifest import Manifest
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.atomic import write_bytes

CARD = "README.md"
OWN_FOLDER = "THIS_FOLDER"
"""Stands in the card for wherever the student lies."""


def write_card(
    folder: Path, config: TrainConfig, manifest: Manifest, metrics: Mapping[str, float]
) -> None:
    """Write the card of a run's finished student. Paths of this machine are left out of it."""
    about = manifest.fingerprint
    teacher, student = about.teacher, about.student
    base = config.student.checkpoint
    data = ModelCardData(
        base_model=base if base is not None and _on_the_hub(base) else None,
        datasets=_hub_data(manifest.sources) or None,
        library_name="transformers",
        tags=["diffusion-language-model", "block-diffusion", "distillation", "tide"],
        license=None,  # whoever publishes it must state one: it follows from teacher, student and data
    )
    settings = to_plain(config)
    for name in ("cache", "out", "store", "heldout", "report_to"):
        settings.pop(name)
    if base is not None and not _on_the_hub(base):
        settings["student"].pop("checkpoint")
    scores = [f"| {name.removeprefix('eval_heldout_')} | {value:.4f} |" for name, value in metrics.items()
              if name.startswith("eval_heldout_")]  # fmt: skip
    table = ["", "Held-out, at fixed masks:", "", "| | |", "|---|---|", *scores] if scores else []
    text = "\n".join([
        f"---\n{data.to_yaml()}\n---",
        "",
        "# A block-diffusion student",
        "",
        f"A language model that fills in blocks of {about.lengths.block} masked tokens (mask "
        f"`{student.mask_token}`, id {student.mask_id}), distilled with tide-distill.",
        "",
        "transformers loads it, but its `generate()` would decode from left to right, which this model was never "
        "trained to do. Use",
        "",
        f"```bash\ntide sample {OWN_FOLDER} \"your question\"\n```",
        "",
        "## How it was made",
        "",
        f"* teacher `{teacher.name}` ({teacher.architecture}, weights {teacher.weights[:16]})",
        f"* data: {', '.join(f'`{name}`' for name in manifest.sources) or 'not on record'}",
        f"* cache {manifest.digest}: {manifest.examples:,} examples, {manifest.draws} draws",
        f"* started from {'random weights' if base is None else f'`{base}`' if _on_the_hub(base) else 'a checkpoint'}",
        *table,
        "",
        "Settings:",
        "",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
        "## Licence",
        "",
        "None is stated yet. It follows from the licences of teacher, student and data.",
        "",
    ])  # fmt: skip
    write_bytes(folder / CARD, text.encode())


def _on_the_hub(name: str) -> bool:
    """Whether a checkpoint's name is a hub id, and no path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _hub_data(sources: Sequence[str]) -> list[str]:
    """The data sets of the hub among them: OWNER/NAME."""
    named = (re.fullmatch(r"hf://([\w.-]+/[\w.-]+).*", source) for source in sources)
    return list(dict.fromkeys(match[1] for match in named if match))
