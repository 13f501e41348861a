"""A student's folder: as transformers loads it, as the reference's `a2d-qwen3`, or as the SDAR that
SGLang and LMDeploy serve; its model card.

All layouts hold the same tensors under the same names. The config differs, and the last two store
tied weights twice.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save
from transformers import GenerationConfig

from shared.cache.manifest import Manifest
from shared.models.checkpoint import open_checkpoint, resolve, stated_mask
from shared.models.loading import architecture_of, load_model
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.files import TideError, new_folder, read_json, refuse_odd, write_bytes
from shared.text.tokenizers import Tokenizer
from student_train.model import STUDENTS

logger = logging.getLogger(__name__)

Format = Literal["hf", "a2d", "sdar"]
SDAR_MASK = 151_669  # SGLang and LMDeploy know no other mask of this architecture
SGLANG = "sglang.yaml"

CARD = "README.md"
OWN_FOLDER = "THIS_FOLDER"
"""Stands in the card for wherever the student lies."""
RELEASED = "TIDE-dllm/"
_SIZES = {
    "architecture": "model_type", "hidden_size": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
}  # fmt: skip

_TEXT = """\
---
{data}
---

# A block-diffusion student

A language model that fills in blocks of {about.lengths.block} masked tokens (mask \
`{named[3]}`, id {about.student.mask_id}), distilled with tide-distill.

transformers loads it, but its `generate()` would decode from left to right, which this model was \
never trained to do. Use

```bash
tide sample {folder} "your question"
```

## How it was made

* teacher `{named[0]}` (`{named[1]}`, weights `{named[2]:.16}`)
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

_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "attention_bias", "tie_word_embeddings",
)  # fmt: skip


def save_student(
    model: Any, tokenizer: Tokenizer, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """Write a student as transformers loads it; `state` has the weights where they are sharded."""
    model.generation_config = generation_config(model, tokenizer)
    model.save_pretrained(folder, state_dict=state)
    config = read_json(folder / "config.json")
    rope = old_rope(config["rope_parameters"])
    config |= {name: value for name, value in rope.items() if value is not None}
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    tokenizer.save(folder)


def generation_config(model: Any, tokenizer: Tokenizer) -> GenerationConfig:
    """What ends a response: EOS and the chat template's end of turn, as in sampling."""
    stated = model.config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    ends = [*ends, tokenizer.backend.eos_token_id, *tokenizer.turn_ends]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(int(token) for token in ends if token is not None)),
        pad_token_id=model.config.pad_token_id,
    )


def export_student(source: Path, target: Path, layout: Format) -> None:
    """Read the checkpoint `source` (any layout) and write it to `target`, bit for bit.

    TideError where `source` is no student (but for hf: no Qwen3 one), `target` holds something, or
    for sdar nothing names the mask or the block.
    """
    checkpoint = open_checkpoint(resolve(str(source)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TideError(f"{target} is not empty", fix="choose another folder")
    architecture = architecture_of(checkpoint, STUDENTS)
    if layout != "hf" and architecture != "qwen3":
        what = f"{source} is a {architecture} student, and {layout} is a layout of Qwen3 only"
        raise TideError(what, fix="use --format hf")
    for path in sorted(checkpoint.folder.iterdir()):  # what is written may be sent on
        refuse_odd(path, checkpoint.folder)
    stored = checkpoint.config
    tokenizer = Tokenizer.load(checkpoint.folder)
    block = stored.get("block_size")
    mask = stated_mask(checkpoint, tokenizer) if layout == "sdar" else None
    if layout == "sdar" and (mask is None or block is None):
        what = f"config.json of {source} does not say both mask_token_id and block_size"
        raise TideError(what, fix="write into it what the student was trained with")
    dtype = getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")
    model: Any = load_model(checkpoint, architecture, dtype)
    if block is not None:  # no field of the stock class, which keeps it all the same
        model.config.block_size = block
    with new_folder(target) as half:
        if layout == "hf":
            save_student(model, tokenizer, half)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
            write_bytes(half / "model.safetensors", save(tensors, {"format": "pt"}))
            # Qwen3's fields as transformers 4 writes them.
            config = model.config.to_diff_dict()
            rope = config.pop("rope_parameters", None) or model.config.rope_parameters
            config |= {name: getattr(model.config, name) for name in _FIELDS} | old_rope(rope)
            config["dtype"] = str(model.dtype).removeprefix("torch.")
            if layout == "a2d":
                config |= {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
            else:
                config |= sdar_keys(config) | {"mask_token_id": mask}
                generation_config(model, tokenizer).save_pretrained(half)
                how = f"block_size: {block}\nthreshold: 0.95\n"
                write_bytes(half / SGLANG, how.encode())
                if mask != SDAR_MASK:
                    what = "SGLang and LMDeploy take %s for the mask, and this student's is %s"
                    logger.warning(what + ": they would serve it wrongly", SDAR_MASK, mask)
            write_bytes(half / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            tokenizer.save(half)
        for name in (CARD, "LICENSE"):
            if (file := checkpoint.folder / name).is_file():
                write_bytes(half / name, file.read_bytes())


def old_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` by the keys of transformers 4, which takes 10,000 without them."""
    rope = dict(parameters)
    theta = rope.pop("rope_theta")
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": theta, "rope_scaling": None if plain else rope}


def sdar_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a Qwen3 of transformers the SDAR that the engines serve, without code in the
    folder. `model_type` is one that transformers knows. The attributes by which the engines ask are
    aliases of keys that it leaves alone: LMDeploy wants `sdar`, and SGLang `rope_theta`, which
    transformers 5 moves elsewhere.

    Untied: with one card SGLang finds no place for the head of a tied SDAR.
    """
    return {
        "architectures": ["SDARForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False,
        "attribute_map": {"model_type": "served_as", "rope_theta": "rope_base"},
        "served_as": "sdar", "rope_base": config["rope_theta"],
    }  # fmt: skip


def published_id(checkpoint: str) -> str | None:
    """The hub id of a checkpoint: of one named so, in a cache of the hub, or in a folder that is
    called as one of TIDE's released students. None for any other folder.
    """
    place = Path(checkpoint)
    if place.is_dir():
        kept = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", place.resolve().as_posix())
        name = place.resolve().name
        released = re.fullmatch(r"distill-(LLaDA2|WeDLM)-(TIDE_Cross|TIDE_Shared|CALM|KL)", name)
        return f"{kept[1]}/{kept[2]}" if kept else RELEASED + name if released else None
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", checkpoint)
    return checkpoint if named else None


def one_line(text: str) -> str:
    """Text of others within Markdown's backticks: a short printable line, no token of the hub."""
    plain = "".join(c if c.isprintable() and c != "`" else " " for c in text)
    return re.sub(r"hf_\w{20,}", "hf_…", " ".join(plain.split()))[:200] or "?"


def write_card(
    folder: Path, config: TrainConfig, manifest: Manifest, metrics: Mapping[str, float]
) -> None:
    """Write the card of a run's finished student. Paths of this machine are left out of it."""
    base, settings = config.student.checkpoint, to_plain(config)
    known = None if base is None else published_id(base)
    for name in ("cache", "out", "store", "heldout", "report_to"):
        settings.pop(name)
    # The recipe's sizes are those of a new student; the folder has the config of this one.
    own = read_json(folder / "config.json")
    settings["student"] |= {name: own[key] for name, key in _SIZES.items()}
    if base is not None:
        settings["student"]["checkpoint"] = known or "a folder"
    of_the_hub = [re.fullmatch(r"hf://([\w.-]+/[\w.-]+).*", name) for name in manifest.sources]
    data = ModelCardData(
        base_model=known,
        datasets=list(dict.fromkeys(match[1] for match in of_the_hub if match)) or None,
        library_name="transformers",
        tags=["diffusion-language-model", "block-diffusion", "distillation", "tide"],
        license=None,  # whoever publishes it must state one
    )
    prefix = "eval_heldout_"
    heldout = {name: value for name, value in metrics.items() if name.startswith(prefix)}
    scores = "\nHeld-out, at fixed masks:\n\n| | |\n|---|---|\n" if heldout else ""
    for name, value in heldout.items():
        scores += f"| {name.removeprefix(prefix)} | {value:.4f} |\n"
    start = f"`{known}`" if known else "random weights" if base is None else "a checkpoint"
    if known and known.startswith(RELEASED):
        start += ", a student that TIDE's authors released"
    if (lora := config.student.lora) is not None:
        start += f", through LoRA of rank {lora.rank} (alpha {lora.alpha}, on "
        start += f"{', '.join(lora.targets)}), which is merged into these weights"
    by = manifest.fingerprint.teacher
    named = by.name, by.architecture, by.weights, manifest.fingerprint.student.mask_token
    text = _TEXT.format(
        data=data.to_yaml(),
        about=manifest.fingerprint,
        named=[one_line(name) for name in named],
        manifest=manifest,
        folder=OWN_FOLDER,
        sources=", ".join(f"`{one_line(n)}`" for n in manifest.sources) or "not on record",
        start=start,
        scores=scores,
        settings=json.dumps(settings, indent=1),
    )
    write_bytes(folder / CARD, text.encode())
