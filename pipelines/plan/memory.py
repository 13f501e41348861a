"""Memory in use, operator by operator, by what it holds. Of tensors without content or with it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

KINDS = ("weights", "gradients", "optimizer", "logits", "activations")
_ROUND = 512
"""Bytes to which CUDA's allocator rounds up."""


class MemoryWatch(TorchDispatchMode):
    """Bytes of all storages that live, and what they held when there were most. `vocabulary`: a tensor whose last
    dimension this is holds logits.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._entries: Any = WeakIdKeyDictionary()
        """Kind and size of each storage that lives."""
        self._live: Counter[str] = Counter()
        self.peak: dict[str, int] = dict.fromkeys(KINDS, 0)

    def hold(self, kind: str, tensors: Iterable[Any]) -> None:
        """These are of that kind, whatever they were before."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            entry = self._entries.get(storage)
            if entry is None:
                self._add(storage, kind)
            else:
                self._live[entry[0]] -= entry[1]
                self._live[kind] += entry[1]
                entry[0] = kind
        self._compare()

    def watch_gradients(self, model: Any) -> None:
        """What is added up in `.grad` counts as gradients."""
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.hold("gradients", [p.grad]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._entries:
                    wide = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
                    self._add(storage, "logits" if wide else "activations")
        self._compare()
        return out

    def _add(self, storage: Any, kind: str) -> None:
        entry = [kind, _rounded(storage)]
        self._entries[storage] = entry
        self._live[kind] += entry[1]
        weakref.finalize(storage, self._drop, entry)

    def _drop(self, entry: list[Any]) -> None:
        self._live[entry[0]] -= entry[1]

    def _compare(self) -> None:
        if sum(self._live.values()) > sum(self.peak.values()):
            self.peak = {kind: self._live[kind] for kind in KINDS}


def _rounded(storage: Any) -> int:
    return -(-storage.nbytes() // _ROUND) * _ROUND
