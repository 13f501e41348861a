"""8-bit and 4-bit weights by bitsandbytes, for GPUs that are too small for bfloat16."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from shared.system.errors import TideError

Quantization = Literal["int8", "int4"]
"""`int8`: LLM.int8() with float16-outlier columns. `int4`: NF4 in blocks of 64."""


def require_bitsandbytes() -> Any:
    """The library; TideError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise TideError(
            "engine.quantization needs bitsandbytes, which is not installed",
            fix='pip install ".[quant]", or leave engine.quantization out',
        ) from error
    return bitsandbytes


def quantize_linears(
    model: nn.Module, kind: Quantization, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace every linear layer but the LM head by its quantised one on `device`, one at a time.

    The full-precision weights stay in host memory until their turn, so the device never holds more than the
    quantised model and one layer. TideError for experts in stacked tensors, which bitsandbytes leaves as they are.
    """
    library = require_bitsandbytes()
    stacked = [name for name, p in model.named_parameters() if p.dim() == 3]
    if stacked:
        raise TideError(
            f"engine.quantization={kind} covers linear layers; this teacher keeps its experts in stacked tensors "
            f"({stacked[0]}, …), which would stay in {dtype}",
            fix="leave engine.quantization out, and use engine.device_map=auto where one GPU is too small",
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner),
                leaf,
                _quantized(library, module, kind, dtype).to(device),
            )


def _quantized(
    library: Any, linear: nn.Linear, kind: Quantization, dtype: torch.dtype
) -> nn.Module:
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data
    if kind == "int8":
        layer = library.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = library.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
        layer.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer
