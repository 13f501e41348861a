"""`run.json`: what a run's folder holds, so that no other run goes on in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cache.manifest import Manifest, differences
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.files import read_json

logger = logging.getLogger(__name__)

_RUN = "run.json"
# Settings that change nothing of what is trained.
_MAY_CHANGE = {"log_steps", "checkpoint_steps", "eval_steps", "report_to", "run_name"}
_MAY_CHANGE |= {"loader_workers", "store_cache_gb"}


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`; empty where there is none yet. TideError where they are
    damaged.
    """
    return dict(_recorded(out).get("config", {}))


def _recorded(out: Path) -> dict[str, Any]:
    path = out / _RUN
    if not path.exists():
        return {}
    try:
        about = read_json(path)
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise ValueError("it describes no run")
    except ValueError as error:
        raise TideError(
            f"{path} is damaged: {error}", fix="delete the run's folder and train again"
        ) from error
    return about


def begin_or_go_on(config: TrainConfig, manifest: Manifest, processes: int, steps: int) -> None:
    """Write what this run of `steps` steps is, or refuse to go on with another one.

    A run may be looked at otherwise (`_MAY_CHANGE`), and it may become longer, which is said.
    """
    settings = to_plain(config)
    settings.pop("out")
    if config.global_batch is None:
        settings["batch_size"] *= (
            processes  # the same rows make a step, however many processes share them
        )
    else:
        del (
            settings["batch_size"],
            settings["accumulation"],
        )  # how a step is divided does not change it
    this = {"config": settings, "cache": manifest.digest, "draws": manifest.draws, "steps": steps}
    this = json.loads(json.dumps(this))
    before = _recorded(config.out)
    if before:
        longer = steps > before.get("steps", steps)
        lines = differences(_identity(before, longer), _identity(this, longer))
        if lines:
            raise TideError(
                f"{config.out} holds a run with other settings (run → now):\n    "
                + "\n    ".join(lines),
                fix="give back the old settings, or choose another folder (--out)",
            )
        if longer:
            logger.info(
                "the run is extended from %d to %d steps: learning rate and TIDAL follow the "
                "longer schedule",
                before["steps"],
                steps,
            )
    if before != this:
        write_bytes(config.out / _RUN, (json.dumps(this, indent=2) + "\n").encode())


def _identity(about: Mapping[str, Any], longer: bool) -> dict[str, Any]:
    """What must be the same; the length need not where a run becomes longer."""
    free = _MAY_CHANGE | ({"epochs", "max_steps"} if longer else set())
    config = {name: value for name, value in about["config"].items() if name not in free}
    return {**about, "config": config, "steps": None}
