"""What every engine offers: scores for requests, in the order of the requests."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import Scores


@runtime_checkable
class Engine(Protocol):
    """Runs the teacher. Values do not depend on which requests are scored together."""

    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores of each request, in order; the LM head runs at the read positions only."""
        ...

    def outside(self, requests: Sequence[Request]) -> Float[np.ndarray, "temperatures vocab"]:
        """Each token's probability outside of the top-k, summed over all read rows (float64)."""
        ...

    def use_classes(self, class_of: Int[np.ndarray, " vocab"]) -> None:
        """From now on scores hold the masses of these classes (−1: in none); one class: none."""
        ...

    def close(self) -> None:
        """Give back what the engine holds: processes, files."""
        ...
