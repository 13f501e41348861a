"""The teacher outside its top-k, as tensors: logits that are linear in a few coefficients.

A position's code is A·(h − μ), of the teacher's last hidden state h (`row.Tables`). At temperature
T the tail's log-weights are, on the scale of log p / T,

    x_T(v) + L_T,    x_T(v) = (m_v + Σ_j code_j · D_vj) / T + b_T(v)

with one level L_T a position, which gives the tail the mass that the teacher's had. Stage one makes
the levels with what stage two reads: rounding the code moves no mass into the tail or out of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from shared.cache.levels import EMPTY
from shared.cache.row import Tables


@dataclass(frozen=True)
class LinearTail:
    """`base` is m / T + b_T at each cached T, EMPTY at ids that only one of the models has.

    `unshared`: those ids; None where there are none.
    """

    directions: Float[Tensor, "vocab rank"]
    base: Mapping[float, Float[Tensor, " vocab"]]
    unshared: Bool[Tensor, " vocab"] | None = None

    @classmethod
    def of(
        cls, tables: Tables, temperatures: Sequence[float], width: int | None = None
    ) -> "LinearTail":
        """On the CPU. `width`: ids of the student, for whom the teacher's are cut or filled up."""
        missing = 0 if width is None else width - tables.rank_of.size
        known = np.concatenate([tables.shared, np.zeros(max(0, missing), bool)])[:width]
        shared = torch.from_numpy(known)
        scales, whole = torch.tensor(tables.scales), torch.tensor(tables.directions)
        base = {}
        for temperature, calibration in zip(temperatures, tables.calibration, strict=True):
            at = torch.from_numpy(tables.mean / np.float32(temperature) + calibration)
            base[temperature] = pad(at, (0, missing)).where(shared, EMPTY)
        directions = pad(whole.float() * scales, (0, 0, 0, missing))
        return cls(directions, base, None if known.all() else ~shared)

    def to(self, device: torch.device) -> "LinearTail":
        """On another device; the same object where it is there already."""
        if self.directions.device == device:
            return self
        base = {temperature: each.to(device) for temperature, each in self.base.items()}
        unshared = None if self.unshared is None else self.unshared.to(device)
        return LinearTail(self.directions.to(device), base, unshared)

    def at(self, code: Float[Tensor, "n rank"], temperature: float) -> Float[Tensor, "n vocab"]:
        """x_T of every token at a cached temperature, in the code's precision; about EMPTY at
        unshared ids.
        """
        base, directions = self.base[temperature].to(code), self.directions.to(code)
        return torch.addmm(base, code / temperature, directions.T)

    def levels(
        self,
        code: Float[Tensor, "n rank"],
        listed: Int[Tensor, "n k"],
        tails: Float[Tensor, "n temperatures"],
    ) -> Float[Tensor, "n temperatures"]:
        """L_T, by which the ids that are not `listed` have the log-weights `tails` together."""
        found = []
        for temperature, tail in zip(self.base, tails.unbind(dim=1), strict=True):
            outside = self.at(code, temperature).scatter_(1, listed, EMPTY)
            found.append(tail - torch.logsumexp(outside, dim=1))
        return torch.stack(found, dim=1)
