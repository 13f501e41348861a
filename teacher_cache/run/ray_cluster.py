"""The Ray cluster at hand: reached once, asked what it has."""

from __future__ import annotations

import importlib.util
from typing import Any

from shared.system.errors import TideError


def connect() -> Any:
    """Ray, talking to the cluster at hand (`RAY_ADDRESS`, or the local one)."""
    if importlib.util.find_spec("ray") is None:
        raise TideError(
            "engine.workers is ray, and Ray is not installed", fix="pip install '.[ray]'"
        )
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            raise TideError(
                "engine.workers is ray, and no Ray cluster answers",
                expected="a running cluster",
                fix="start one (`ray start --head`), or name it in RAY_ADDRESS",
            ) from error
    return ray


def cluster_has_gpus() -> bool:
    """Whether the cluster at hand has GPUs."""
    return bool(connect().cluster_resources().get("GPU"))
