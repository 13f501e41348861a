"""Several processes, one GPU each, that share out an evaluation: `accelerate launch -m pipelines.cli eval …`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed


class Processes:
    """This process among those that torchrun or accelerate started; alone where none did."""

    def __init__(self) -> None:
        self._grouped = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._grouped and not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def rank(self) -> int:
        """0 … count − 1."""
        return distributed.get_rank() if self._grouped else 0

    @property
    def count(self) -> int:
        """How many there are."""
        return distributed.get_world_size() if self._grouped else 1

    def device(self, wanted: str | None) -> str:
        """The device of this process: among several, its own GPU; for a GPU that is not there, the CPU."""
        if self._grouped and torch.cuda.is_available():
            place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(place)
            return place
        if wanted is None or (wanted.startswith("cuda") and not torch.cuda.is_available()):
            return "auto"
        return wanted

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other."""
        if not self._grouped:
            return tensor
        tensor = tensor.reshape(-1) if tensor.dim() == 0 else tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int) -> list[Any]:
        """The objects of all processes, on `dst`; nothing elsewhere."""
        if not self._grouped:
            return [obj]
        parts: list[Any] | None = [None] * self.count if self.rank == dst else None
        distributed.gather_object(obj, parts, dst=dst)
        return parts or []

    def barrier(self) -> None:
        """Wait for all."""
        if self._grouped:
            distributed.barrier()
