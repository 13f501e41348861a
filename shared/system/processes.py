"""Several processes of one job, as torchrun and accelerate start them."""

from __future__ import annotations

import os

from torch import distributed


def first_here() -> bool:
    """Whether this is the first process of its machine, or the only one."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def part() -> None:
    """Processes part together: one that exits while its threads still talk to another is aborted."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
