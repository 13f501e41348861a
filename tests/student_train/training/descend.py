"""Run as a program: `train_student` with an optimizer by name, and with FSDP on a CPU where the
settings ask for it.

Arguments are the settings as JSON and the optimizer. It is a module, not text in a test, so that a
name that is gone is found by the type checker.
"""

import json
import sys
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from shared.settings.build import build
from shared.settings.config import TrainConfig
from student_train.training import preflight, trainer


def take_optimizer(name: str) -> None:
    """By plain gradient descent with rate 1 the step's change of the weights is the gradient
    itself.
    """
    arguments = trainer.training_arguments

    def descend(*args: Any, **named: Any) -> Any:
        made = arguments(*args, **named)
        made.optim = name
        return made

    trainer.training_arguments = descend


def shard_on_cpus() -> None:
    """accelerate shards on accelerators only. Told that this process is on one, it does the same
    over gloo.
    """
    from accelerate import state

    begin = state.PartialState.__init__

    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = told
    torch.accelerator.is_available = lambda: True  # type: ignore[assignment]
    preflight.check_machine = lambda config, processes: None  # noqa: ARG005
    evaluate = trainer.StudentTrainer.evaluate

    def sharded(self: Any, **ignored: Any) -> Any:
        assert isinstance(self.model, FSDPModule)
        return evaluate(self)

    trainer.StudentTrainer.evaluate = sharded  # type: ignore[method-assign]


if __name__ == "__main__":
    config = build(TrainConfig, json.loads(sys.argv[1]))
    take_optimizer(sys.argv[2])
    if config.parallel == "fsdp":
        shard_on_cpus()
    trainer.train_student(config)
