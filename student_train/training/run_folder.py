"""`run.json`: what a run's folder holds, so that no other run goes on in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shared.cache.manifest import Manifest, differences
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.files import read_json

_NAME = "run.json"
_MAY_CHANGE = ("log_steps", "checkpoint_steps", "eval_steps", "report_to", "run_name", "loader_workers",
               "store_cache_gb")  # fmt: skip
"""Settings that change nothing of what is trained."""


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`; empty where there is none yet. TideError where they are damaged."""
    return dict(_read(out).get("config", {}))


def settle_run_folder(config: TrainConfig, manifest: Manifest, processes: int, steps: int) -> None:
    """Write what this run of `steps` steps is, or refuse to go on with another one. A run may be looked at otherwise
    (`_MAY_CHANGE`), and it may become longer, which is said.
    """
    about = {
        "config": to_plain(config),
        "cache": manifest.digest,
        "draws": manifest.draws,
        "steps": steps,
    }
    this = json.loads(json.dumps(about))
    this["config"].pop("out")
    if config.global_batch is None:
        this["config"]["batch_size"] *= (
            processes  # the same rows make a step, however many processes share them
        )
    else:
        for name in ("batch_size", "accumulation"):  # how a step is divided does not change it
            this["config"].pop(name)
    before = _read(config.out)
    if before:
        known = {
            name: value for name, value in to_plain(TrainConfig()).items() if name in this["config"]
        }
        before = {
            **before,
            "config": {**json.loads(json.dumps(known)), **before["config"]},
        }  # settings that came since
        longer = steps > before.get("steps", steps)
        lines = differences(_compared(before, longer), _compared(this, longer))
        if lines:
            raise TideError(
                f"{config.out} holds a run with other settings (run → now):\n    "
                + "\n    ".join(lines),
                fix="give back the old settings, or choose another folder (--out)",
            )
        if longer:
            print(
                f"the run is extended from {before['steps']:,} to {steps:,} steps: from here on the learning rate and "
                f"TIDAL follow the schedule of {steps:,}",
                file=sys.stderr,
            )
    if before != this:
        write_bytes(config.out / _NAME, (json.dumps(this, indent=2) + "\n").encode())


def _compared(about: dict[str, Any], longer: bool) -> dict[str, Any]:
    """What must be the same; the length must not where a run becomes longer."""
    left = {*_MAY_CHANGE, *(("epochs", "max_steps") if longer else ())}
    config = {name: value for name, value in about["config"].items() if name not in left}
    return {**about, "config": config, "steps": None}


def _read(out: Path) -> dict[str, Any]:
    path = out / _NAME
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise ValueError("it describes no run")
    except ValueError as error:
        raise TideError(
            f"{path} is damaged: {error}", fix="delete the run's folder and train again"
        ) from error
    return found
