"""The README.md of a student's folder, for people and for the hub: what it is, how it was made."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from shared.cache.manifest import Manifest
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.files import write_bytes

CARD = "README.md"
OWN_FOLDER = "THIS_FOLDER"
"""Stands in the card for wherever the student lies."""

_TEXT = """\
---
{data}
---

# A block-diffusion student

A language model that fills in blocks of {about.lengths.block} masked tokens (mask \
`{about.student.mask_token}`, id {about.student.mask_id}), distilled with tide-distill.

transformers loads it, but its `generate()` would decode from left to right, which this model was \
never trained to do. Use

```bash
tide sample {folder} "your question"
```

## How it was made

* teacher `{about.teacher.name}` ({about.teacher.architecture}, weights {about.teacher.weights:.16})
* data: {sources}
* cache {manifest.digest}: {manifest.examples:,} examples, {manifest.draws} draws
* started from {start}
{scores}
Settings:

```json
{settings}
```

## Licence

None is stated yet. It follows from the licences of teacher, student and data.
"""


def write_card(
    folder: Path, config: TrainConfig, manifest: Manifest, metrics: Mapping[str, float]
) -> None:
    """Write the card of a run's finished student. Paths of this machine are left out of it."""
    base = config.student.checkpoint
    on_the_hub = (
        base is not None
        and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None
        and not Path(base).exists()
    )
    settings = to_plain(config)
    for name in ("cache", "out", "store", "heldout", "report_to"):
        settings.pop(name)
    if not on_the_hub and base is not None:
        settings["student"].pop("checkpoint")
    of_the_hub = [re.fullmatch(r"hf://([\w.-]+/[\w.-]+).*", name) for name in manifest.sources]
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        datasets=list(dict.fromkeys(match[1] for match in of_the_hub if match)) or None,
        library_name="transformers",
        tags=["diffusion-language-model", "block-diffusion", "distillation", "tide"],
        license=None,  # whoever publishes it must state one
    )
    scores = ""
    for name, value in metrics.items():
        if name.startswith("eval_heldout_"):
            scores += f"| {name.removeprefix('eval_heldout_')} | {value:.4f} |\n"
    if scores:
        scores = f"\nHeld-out, at fixed masks:\n\n| | |\n|---|---|\n{scores}"
    text = _TEXT.format(
        data=data.to_yaml(),
        about=manifest.fingerprint,
        manifest=manifest,
        folder=OWN_FOLDER,
        sources=", ".join(f"`{name}`" for name in manifest.sources) or "not on record",
        start="random weights" if base is None else f"`{base}`" if on_the_hub else "a checkpoint",
        scores=scores,
        settings=json.dumps(settings, indent=1),
    )
    write_bytes(folder / CARD, text.encode())
