"""A run with and without torch.compile, as a program of its own: the checks of shapes that tests
put around functions cannot be compiled. Arguments: a cache, a folder, an objective as JSON. Prints
losses and counts of graphs as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from shared.settings.build import build
from shared.settings.config import TrainConfig
from student_train.training.trainer import make_trainer

STUDENT = {"hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 96}


def main() -> None:
    cache, folder, objective = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found: dict[str, object] = {}
    for way in ("off", "on"):
        counters.clear()
        values = {"cache": cache, "out": folder / way, "compile": way, "max_steps": 12}
        values |= {"distillation": objective, "learning_rate": 1e-2, "batch_size": 4}
        values |= {"log_steps": 1, "checkpoint_steps": 100, "report_to": []}
        values |= {"precision": "float32", "device": "cpu", "student": STUDENT}
        trainer, _ = make_trainer(build(TrainConfig, values))
        graphs: list[int] = []
        trainer.at_item = lambda *_, graphs=graphs: graphs.append(
            counters["stats"]["unique_graphs"]
        )
        trainer.train_resuming()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[way] = {"losses": losses, "graphs": [*graphs, counters["stats"]["unique_graphs"]]}
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
