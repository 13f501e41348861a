"""Several processes of one job, as torchrun and accelerate start them."""

from __future__ import annotations

from torch import distributed


def part() -> None:
    """Processes part together: one that exits while its threads still talk to another is aborted."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
