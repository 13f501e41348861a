"""Where Python waits for the device: every value, size or copy that a step asks of it, with its line."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ROOT = Path(__file__).parents[2]
_VALUES = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "cpu", "nonzero",
           "masked_select", "unique", "__len__of_values")  # fmt: skip


class SyncWatch(TorchFunctionMode):
    """Collects calls that wait for a device, by the line that makes them.

    Works on a CPU, where nothing is waited for, and so tells what a GPU would be waited for. Tensors that hold what a
    device never had (made on the host, as collate's are) are not told apart: look at the line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _VALUES or (name == "to" and _to_host(args[1:], kwargs)) or _by_mask(name, args):
            self.lines[f"{_caller()} {name}"] += 1
        return func(*args, **kwargs)


def _to_host(args: Any, kwargs: dict[str, Any]) -> bool:
    """`.to("cpu")` in so many words; a device in a variable is the trainer's own."""
    return any(isinstance(a, str) and a == "cpu" for a in (*args, *kwargs.values()))


def _by_mask(name: str, args: Any) -> bool:
    """x[mask]: the result's size is a value."""
    if name not in ("__getitem__", "__setitem__") or len(args) < 2:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return name == "__getitem__" and any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index
    )


def _caller() -> str:
    for frame in reversed(traceback.extract_stack(limit=24)[:-2]):
        path = frame.filename
        if "/torch/" in path or path == __file__ or "jaxtyping" in path or "beartype" in path:
            continue
        place = Path(path)
        inside = (
            place.relative_to(_ROOT)
            if place.is_relative_to(_ROOT) and ".venv" not in place.parts
            else None
        )
        name = str(inside) if inside is not None else "/".join(place.parts[-2:])
        return f"{name}:{frame.lineno}"
    return "?"
