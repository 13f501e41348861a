"""Models from checkpoints, from a config alone, and new ones; all of transformers' stock classes.

A checkpoint is loaded by transformers' own `from_pretrained`, fed with the tensors of its files:
code, adapters and settings that lie beside them play no part.
"""

import importlib.util
import logging
from collections import UserDict
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from shared.models.architectures import ARCHITECTURES, FIXED, HARMLESS, Fixed
from shared.models.checkpoint import Checkpoint
from shared.settings.config import ModelShape
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_model(
    checkpoint: Checkpoint,
    architecture: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    device_map: str | None = None,
    quantization: Literal["int8", "int4"] | None = None,
) -> transformers.PreTrainedModel:
    """The model on `device` in `dtype`, in evaluation mode, under SDPA attention.

    `device_map`: over the GPUs `auto`, `balanced` (evenly) or `sequential`; what fits none stays in
    host memory. `quantization`: linear layers but the head in 8 bits (LLM.int8) or 4 (NF4). On the
    device `meta` only the files' headers are read. TideError names tensors that nothing takes,
    parameters that nothing fills, and shapes that do not match.
    """
    kind, folder = ARCHITECTURES[architecture_of(checkpoint, [architecture])], checkpoint.folder
    misfit = f"{folder} does not fit its architecture {architecture}"
    fix = "check that config.json and the weights belong together"
    with ExitStack() as files:
        # 1. The tensors. A config of a billion layers would be built for days.
        tensors = _tensors(checkpoint, files)
        if str(device) == "meta":
            shapes = {key: tensor.get_shape() for key, tensor in tensors.items()}
            tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        layers = checkpoint.config.get("num_hidden_layers") or checkpoint.config.get("n_layers")
        if isinstance(layers, int) and layers > len(tensors):
            counts = f"{layers} layers in config.json, {len(tensors)} tensors in the files"
            raise TideError(f"{misfit}: {counts}", fix=fix)

        # 2. The config, in which every key is obeyed or refused.
        config = meta_model(architecture, checkpoint.config, str(folder)).config
        quantized = None if quantization is None else _bitsandbytes(quantization, dtype, config)

        # 3. The weights. transformers' bar and log are still: the error says what its log would.
        level = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            model_class: Any = kind.model_class
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=tensors, key_mapping=dict(kind.renames),
                dtype=dtype, device_map=device_map or {"": device}, offload_buffers=True,
                quantization_config=quantized, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            if "disk" in str(error):
                what = "GPUs and host memory together are too small for the teacher"
                smaller = "use engine.quantization=int4, more memory, or a smaller teacher"
                raise TideError(what, fix=smaller) from error
            if "conversion" in str(error):
                what = f"{misfit}: tensors that belong together differ in shape"
                raise TideError(what, fix=fix) from error
            raise
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()

    # 4. Its report. Tied weights that the checkpoint stores twice must agree.
    problems = [f"{name} has no place" for name in sorted(report["unexpected_keys"])]
    problems += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    for name, came, expected in sorted(report["mismatched_keys"]):
        problems.append(f"{name} has the shape {tuple(came)}, config.json says {tuple(expected)}")
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    if config.tie_word_embeddings and head is not embedding and not head.is_meta:
        problems.append(f"{HEAD} differs from {EMBEDDING}, to which config.json ties it")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TideError(f"{misfit}: {'; '.join(problems[:5])}{more}", fix=fix)
    model.config.name_or_path = model.name_or_path = ""
    return model.requires_grad_(False)


def head_rows(checkpoint: Checkpoint, architecture: str) -> Float[torch.Tensor, "vocab width"]:
    """The LM head's rows in float32; the embedding's where the two are tied."""
    kind = ARCHITECTURES[architecture_of(checkpoint, [architecture])]
    with ExitStack() as files:
        tensors = {kind.stock_name(key): t for key, t in _tensors(checkpoint, files).items()}
        tied = kind.config(checkpoint.config).tie_word_embeddings
        name = EMBEDDING if tied or HEAD not in tensors else HEAD
        if name not in tensors:
            raise TideError(f"{checkpoint.folder} has no {name}", fix="download it again")
        return tensors[name][:].to(torch.float32)


def _tensors(checkpoint: Checkpoint, files: ExitStack) -> dict[str, Any]:
    """Every tensor by its name in the files, as a slice that is read when it is used."""
    tensors: dict[str, Any] = {}
    for file in checkpoint.weight_files:
        try:
            handle = files.enter_context(safe_open(file, "pt"))
        except (SafetensorError, OSError) as error:
            what = f"{file} is no whole safetensors file: {error}"
            raise TideError(what, fix="download it again") from error
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tensors[key] = handle.get_slice(key)
    return tensors


def _bitsandbytes(quantization: str, dtype: torch.dtype, config: Any) -> Any:
    if hasattr(config, "num_experts_per_tok"):
        raise TideError(
            f"engine.quantization={quantization} covers linear layers; this teacher keeps its "
            f"experts in stacked tensors, which would stay in {dtype}",
            fix="use engine.device_map=auto where one GPU is too small",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TideError(
            "engine.quantization needs bitsandbytes, which is not installed",
            fix='pip install ".[quant]", or leave engine.quantization out',
        )
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return transformers.BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=dtype)


def architecture_of(checkpoint: Checkpoint, among: Collection[str] = tuple(ARCHITECTURES)) -> str:
    """The first architecture that takes a config of this model type. TideError where none does."""
    model_type, kinds = checkpoint.config.get("model_type"), []
    for name in among:
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise TideError(f"unknown architecture {name!r}", expected=f"one of {known}")
        if model_type in ARCHITECTURES[name].model_types:
            return name
        kinds += ARCHITECTURES[name].model_types
    raise TideError(
        f"{checkpoint.folder} has a config of model_type {model_type!r}",
        expected=f"{' or '.join(map(repr, kinds))} for the architecture {' or '.join(among)}",
        fix="choose the model that this checkpoint belongs to, or another checkpoint",
    )


class _Read(UserDict[str, Any]):
    """A config that knows which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)


def meta_model(architecture: str, raw: Mapping[str, Any], source: str = "this teacher") -> Any:
    """The model of a checkpoint's config without weights: true shapes on the meta device."""
    kind, read = ARCHITECTURES[architecture], _Read(raw)
    try:
        config = kind.config(read)
        config._attn_implementation = "sdpa"
        _refuse_unread(read, kind.fixed, source)
        with init_empty_weights():
            return kind.model_class(config)
    except TideError:
        raise
    except Exception as error:  # values that fit no model lead the library anywhere
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        what = f"lacks {reason}" if isinstance(error, KeyError) else f"makes no model: {reason}"
        fix = "download config.json again"
        raise TideError(f"the config of {source} {what}", fix=fix) from error


def _refuse_unread(config: _Read, own: Fixed, source: str) -> None:
    """Every key is obeyed, known to change nothing, or refused by name; `own` is fixed too."""
    fixed, unknown = {**FIXED, **own}, []
    for key, value in config.data.items():
        # 1. A value for which the class is not written.
        allowed: tuple[Any, ...] = fixed.get(key, ())
        wrong = bool(allowed) and value is not None and value not in allowed
        if key == "layer_types":
            allowed = ("full_attention alone",)
            wrong = not isinstance(value, list | None) or set(value or ()) - {"full_attention"}
        if wrong:
            raise TideError(
                f"{key} in the config of {source} is {str(value)[:80]}, and no such model is built",
                expected=" or ".join(map(str, allowed)),
                fix="use another checkpoint",
            )
        # 2. A key that nothing reads. Notes of libraries begin with _; dropout is never used. What
        #    is off (null, false, 0, empty) changes nothing.
        known = key in config.keys_read or key in fixed or key in HARMLESS or key == "layer_types"
        known = known or key.startswith("_") or key.endswith(("dropout", "pdrop"))
        off = value is None or value is False or value in (0, "", (), [], {})
        if not known and not off:
            unknown.append(f"{key} ({str(value)[:40]})")
    if unknown:
        raise TideError(
            f"the config of {source} has keys that nothing here reads, and that may change what "
            f"the model computes: {', '.join(unknown[:5])}",
            fix="take them out of config.json in a copy of the folder, if they change nothing",
        )


def random_model(
    architecture: str, config: dict[str, Any], dtype: torch.dtype, device: Any = "cpu"
) -> transformers.PreTrainedModel:
    """The model with random weights, to measure speed and memory with."""
    empty = meta_model(architecture, config)
    with torch.device(device):
        model = type(empty)._from_config(empty.config, dtype=dtype)
    return model.requires_grad_(False).eval()


def new_model(
    shape: ModelShape, tokenizer: Tokenizer, mask_id: int, positions: int
) -> transformers.PreTrainedModel:
    """A student of `shape` for `tokenizer`, embedding and head tied; seed torch first."""
    model_class: Any = ARCHITECTURES[shape.architecture].model_class
    config = model_class.config_class(
        vocab_size=max(len(tokenizer), mask_id + 1),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.special_id("eos"),
        pad_token_id=tokenizer.special_id("pad"),
        mask_token_id=mask_id,
        attn_implementation="sdpa",
    )
    return model_class(config)


# For all shapes. Sizes of 0 and 1, and sizes that are equal by chance, have graphs of their own: a
# function that met more of them than the limit, 8 by default, would run uncompiled from then on.
COMPILE: dict[str, Any] = {"dynamic": True, "recompile_limit": 64}


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place. Weights keep their names; batches of other lengths
    compile nothing anew.
    """
    for layer in model.model.layers:
        layer.compile(**COMPILE)
