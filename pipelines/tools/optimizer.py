"""Muon for the matrices of the layers, AdamW for all else: a small model learns faster by both than by AdamW alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Two of PyTorch's optimizers as one, with one learning rate (Muon's step has the size of AdamW's)."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if inner else others).append(parameter)
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas),
        )
        super().__init__([*matrices, *others], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """A schedule writes to `param_groups`: they are the parts' own."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
