"""Runs of stage two as a program of its own, which tests start. It is a module, not text in a test,
so that a name that is gone is found by the type checker.

`SETTINGS stop`: `train_student`, of whose second process a signal asks to stop in its third step.
`SETTINGS [OPTIMIZER]`: `train_student`, perhaps with an optimizer by name, and with FSDP on a CPU
where the settings ask for it. `SETTINGS compiled`: the run with and without torch.compile (the
checks of shapes that tests put around functions cannot be compiled); prints losses and graphs.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule

from shared.settings.build import build
from shared.settings.config import TrainConfig
from student_train.training import preflight, trainer


def take_optimizer(name: str) -> None:
    """By plain gradient descent with rate 1 a step's change of the weights is the gradient."""
    arguments = trainer.training_arguments

    def descend(*args: Any) -> Any:
        made = arguments(*args)
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


def compiled_or_not(config: TrainConfig) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for way in ("off", "on"):
        counters.clear()
        made, _ = trainer.make_trainer(replace(config, compile=way, out=config.out / way))
        graphs: list[int] = []
        made.at_item = lambda *_, graphs=graphs: graphs.append(counters["stats"]["unique_graphs"])
        made.train_resuming()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        runs[way] = {"losses": losses, "graphs": [*graphs, counters["stats"]["unique_graphs"]]}
    return runs


def stop_in_the_third_step(config: TrainConfig) -> None:
    made, _ = trainer.make_trainer(config)

    def at_item(item: int, *_: Any) -> None:
        if item == 5 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGINT)

    made.at_item = at_item
    try:
        made.train_resuming()
    except KeyboardInterrupt:
        print(f"process {os.environ['RANK']} stopped at {made.state.global_step}")


if __name__ == "__main__":
    config, what = build(TrainConfig, json.loads(sys.argv[1])), sys.argv[2:]
    if what == ["compiled"]:
        print(json.dumps(compiled_or_not(config)))
    elif what == ["stop"]:
        stop_in_the_third_step(config)
    else:
        if what:
            take_optimizer(what[0])
        if config.parallel == "fsdp":
            shard_on_cpus()
        trainer.train_student(config)
