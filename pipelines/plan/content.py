"""Models and tensors without content, and the same with random content, to measure against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def no_content() -> Iterator[FakeTensorMode]:
    """Inside, tensors have shapes and no content."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def fill(model: Any, dtype: torch.dtype) -> Any:
    """A model of the meta device on a CPU, with random weights; under `no_content` without any."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        made = torch.empty(parameter.shape, dtype=dtype).normal_(std=0.02)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        made = torch.ones(buffer.shape, dtype=buffer.dtype)
        model.get_submodule(owner).register_buffer(leaf, made, persistent=False)
    model.tie_weights()
    return model
