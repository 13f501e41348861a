import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.models import flex


def test_attention_does_not_cut_its_compiled_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, on tensors without content; only the kernel is left out."""
    monkeypatch.setattr(flex, "flex_attention", lambda _query, _key, value, **_: value)
    # Without the tests' import hook, which the compiler cannot read.
    attend = inspect.unwrap(flex.attend_flex)
    with FakeTensorMode():
        value = torch.empty(1, 8, 2, 16, device="cuda").transpose(1, 2)
        whole = torch.compile(attend, backend="eager", fullgraph=True)  # raises where it is cut
        assert whole(None, value, value, value, None)[0].shape == (1, 8, 2, 16)
