from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipes.read import cache_config
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import check_weights
from shared.system.errors import TideError
from shared.system.hardware import choose_device
from teacher_cache.engines.vllm_engine import engine as vllm_engine
from teacher_cache.run.preflight import settle_engine


def settle(teacher: str, *settings: str) -> str:
    return settle_engine(cache_config(teacher, None, list(settings))).engine.type


@pytest.mark.parametrize(
    ("teacher", "settings", "with_vllm"),
    [
        ("llada-8b", (), "vllm"),
        ("llada2-mini", (), "vllm"),
        ("dream-7b", (), "vllm"),
        ("llada2-mini-blocks", (), "transformers"),
        ("wedlm-8b", (), "transformers"),
        ("wedlm-8b-x0_xt", (), "transformers"),
        ("sdar-8b", (), "transformers"),
        ("llada-8b", ("engine.quantization=int8",), "transformers"),
    ],
)
def test_auto_takes_vllm_where_it_can(
    teacher: str, settings: tuple[str, ...], with_vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "installed", lambda: True)
    assert settle(teacher, "engine.type=auto", *settings) == with_vllm
    monkeypatch.setattr(vllm_engine, "installed", lambda: False)
    assert settle(teacher, "engine.type=auto", *settings) == "transformers"
    assert settle(teacher, *settings) == "transformers"


def test_what_vllm_cannot_do_is_refused_with_the_engine_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_engine, "installed", lambda: True)
    for teacher, mode in [
        ("wedlm-8b", "native"),
        ("wedlm-8b-x0_xt", "x0_xt"),
        ("sdar-8b", "block_causal"),
    ]:
        with pytest.raises(TideError, match=rf"runs under {mode}[\s\S]*--engine transformers"):
            settle(teacher, "engine.type=vllm")
    monkeypatch.setattr(vllm_engine, "installed", lambda: False)
    with pytest.raises(TideError, match=r"not installed[\s\S]*\[vllm\]"):
        settle("llada-8b", "engine.type=vllm")
    with pytest.raises(TideError, match="the transformers engine has no such thing"):
        settle("llada-8b", "engine.tensor_parallel=2")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["llada", "dream", "llada_moe", "llada2_moe"])
def test_the_account_of_a_checkpoint_needs_no_weights(golden: Path, name: str) -> None:
    check_weights(open_checkpoint(str(golden / name)), name)
    with pytest.raises(TideError, match="has a config of model_type"):
        check_weights(open_checkpoint(str(golden / name)), "llama")
