"""Do cache, objective and installation fit? Checked before a student is loaded."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

from shared.errors import TideError
from shared.manifest import Manifest
from shared.objectives import KL, Calm, Distillation, NoDistillation, ReverseCalm, ReverseKL


def check_trackers(names: Sequence[str]) -> None:
    """TideError where a tracker of `report_to` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TideError(
                f"report_to names {name}, which is not installed",
                fix=f"pip install {name}, or take it out of report_to",
            )


def check_objective(settings: Distillation, manifest: Manifest, cache: Path) -> None:
    """TideError where the cache lacks what the objective needs; one warning where the paper advises against it."""
    match settings:
        case NoDistillation():
            return
        case KL() | ReverseKL():
            if "topk" not in manifest.signals or not manifest.shared_tokenizer:
                raise TideError(
                    f"{settings.type} compares token distributions, and {cache} has none in the student's vocabulary",
                    expected="a cache with the signal topk from a teacher that shares the student's tokenizer",
                    fix="use calm or reverse_calm, or a cache from such a teacher",
                )
            if settings.temperature not in manifest.temperatures:
                raise TideError(
                    f"the temperature {settings.temperature} is not in the cache {cache}",
                    expected=f"one of {', '.join(map(str, manifest.temperatures))}",
                    fix="choose one of these, or build a cache with targets.temperatures that includes it",
                )
        case Calm() | ReverseCalm():
            if "chunks" not in manifest.signals:
                raise TideError(
                    f"{settings.type} needs chunk likelihoods, and {cache} has only {', '.join(manifest.signals)}",
                    fix='build a cache with targets.signals=["topk","chunks"]',
                )
    if settings.tidal is not None and isinstance(settings, ReverseKL | ReverseCalm):
        warnings.warn(
            f"TIDAL with {settings.type}: the paper advises against TIDAL with a reverse objective", stacklevel=2
        )
