"""Operators as they come, with their FLOPs and bytes; and what they would be with all runs of element-wise work fused.

Tensors have no content (FakeTensorMode), so true shapes cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipelines.plan.cards import Card

_OWN_KERNEL = (
    "mm", "attention", "attn", "embedding", "index", "gather", "scatter", "sort", "topk", "_fused_", "cumsum",
    "_foreach", "bincount",
)  # fmt: skip
"""Parts of the names of operators that no compiler joins with their neighbours."""
_NO_KERNEL = (
    "empty", "detach", "device", "_local_scalar_dense", "profiler", "_record_function", "resize_", "set_",
    "_unsafe_view",
)  # fmt: skip


OPTIMIZER = "optimizer"
"""The part that comes once in a step, however many passes it has."""


@dataclass(frozen=True)
class Kernel:
    """One kernel. `reads` and `writes`: bytes by storage, so that a compiler's fusion can leave some out."""

    name: str
    phase: str
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]

    @property
    def bytes(self) -> int:
        """Moved to and from the GPU's memory."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def stands_alone(self) -> bool:
        """Whether it stays a kernel of its own when its neighbours are compiled."""
        return self.flops > 0 or any(part in self.name for part in _OWN_KERNEL)


@dataclass(frozen=True)
class Cost:
    """Sums over kernels."""

    kernels: int
    flops: float
    bytes: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.kernels + other.kernels, self.flops + other.flops, self.bytes + other.bytes,
            self.seconds + other.seconds,
        )  # fmt: skip

    def __mul__(self, times: int) -> Cost:
        return Cost(
            self.kernels * times, self.flops * times, self.bytes * times, self.seconds * times
        )


def cost(kernels: list[Kernel], card: Card) -> Cost:
    """Kernels one after the other on a card, launches not counted."""
    return Cost(
        len(kernels),
        sum(k.flops for k in kernels),
        sum(k.bytes for k in kernels),
        sum(card.seconds(k.flops, k.bytes) for k in kernels),
    )


class Counter(TorchDispatchMode):
    """Takes note of every operator. It keeps all tensors, so that no storage's number is given twice: for content that
    takes no memory only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._phase, self._kept, self._numbers = "", [], dict[int, int]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What comes inside belongs to a part of the work."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def enter(self, name: str) -> None:
        """As `phase`, from here on."""
        self._phase = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if not _is_view(func) and not any(name.startswith(part) for part in _NO_KERNEL):
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            count = flop_registry.get(func._overloadpacket)
            flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
            self.kernels.append(
                Kernel(name, self._phase, flops, self._sizes(inputs), self._sizes(outputs))
            )
        return out

    def _sizes(self, tensors: list[torch.Tensor]) -> dict[int, int]:
        found: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            own = tensor.numel() * tensor.element_size()
            seen = min(own, storage.nbytes())  # what is expanded is read once
            found[storage._cdata] = max(found.get(storage._cdata, 0), seen)
        return found


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and any(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def fused(kernels: list[Kernel], phases: tuple[str, ...]) -> list[Kernel]:
    """The kernels where a compiler makes one of element-wise work and reductions that follow from each other, between
    two products, in these phases. Such a kernel reads what came from outside of it, once, and writes what is read after
    it.
    """
    last_read: dict[int, int] = {}
    for i, kernel in enumerate(kernels):
        for storage in kernel.reads:
            last_read[storage] = i
    found: list[Kernel] = []
    run: list[int] = []

    def flush() -> None:
        found.extend(
            _joined(kernels, part, run[-1], last_read) for part in _connected(kernels, run)
        )
        run.clear()

    for i, kernel in enumerate(kernels):
        if run and kernel.phase != kernels[run[0]].phase:
            flush()
        if kernel.phase in phases and not kernel.stands_alone:
            run.append(i)
            continue
        flush()
        found.append(kernel)
    flush()
    return found


def _connected(kernels: list[Kernel], run: list[int]) -> list[list[int]]:
    """The run in parts, of which none reads what another wrote."""
    parts: list[list[int]] = []
    of_storage: dict[int, list[int]] = {}
    for i in run:
        before: list[list[int]] = []
        for storage in kernels[i].reads:
            part = of_storage.get(storage)
            if part is not None and all(part is not one for one in before):
                before.append(part)
        mine = sorted([i, *(j for part in before for j in part)])
        parts = [part for part in parts if all(part is not one for one in before)] + [mine]
        for j in mine:
            of_storage |= dict.fromkeys(kernels[j].writes, mine)
    return parts


def _joined(kernels: list[Kernel], part: list[int], end: int, last_read: dict[int, int]) -> Kernel:
    reads: dict[int, int] = {}
    written: dict[int, int] = {}
    for i in part:
        for storage, size in kernels[i].reads.items():
            if storage not in written:
                reads[storage] = max(reads.get(storage, 0), size)
        for storage, size in kernels[i].writes.items():
            written[storage] = max(written.get(storage, 0), size)
    # What nobody reads later may be a result (a gradient): it stays unless something in the part read it.
    inside = {storage for i in part for storage in kernels[i].reads}
    writes = {s: n for s, n in written.items() if last_read.get(s, -1) > end or s not in inside}
    return Kernel("fused", kernels[part[0]].phase, 0.0, reads, writes)


@dataclass
class Phases:
    """The cost of each part of the work, as it is written and as it is compiled."""

    card: Card
    plain: dict[str, Cost] = field(default_factory=dict)
    compiled: dict[str, Cost] = field(default_factory=dict)

    @classmethod
    def of(cls, kernels: list[Kernel], card: Card, phases: tuple[str, ...]) -> Phases:
        """`phases`: those that are compiled."""
        made = cls(card)
        for target, own in ((made.plain, kernels), (made.compiled, fused(kernels, phases))):
            for name in dict.fromkeys(k.phase for k in own):
                target[name] = cost([k for k in own if k.phase == name], card)
        return made

    def total(self, compiled: bool, passes: int = 1) -> Cost:
        """Of all parts. `passes`: how often all but the optimizer comes in a step."""
        parts = self.compiled if compiled else self.plain
        return sum(
            (part * (1 if name == OPTIMIZER else passes) for name, part in parts.items()),
            Cost(0, 0.0, 0.0, 0.0),
        )

    def seconds(self, compiled: bool, passes: int = 1) -> float:
        """GPU time and the launches, which are taken not to hide behind each other."""
        whole = self.total(compiled, passes)
        return whole.seconds + whole.kernels * self.card.launch

    def share_of_peak(self, compiled: bool, passes: int = 1) -> float:
        """Of the card's products."""
        return self.total(compiled, passes).flops / (
            self.seconds(compiled, passes) * self.card.tflops * 1e12
        )
