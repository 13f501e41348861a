"""Configs and folders of strangers: obeyed, or refused with an explanation; nothing of them is run.

published.json has configs of published checkpoints as others reprint them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import check_weights, load_model, meta_model
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer

ARCHITECTURE_OF = {
    "a2d_qwen3": "qwen3", "llada": "llada", "dream": "dream", "wedlm": "qwen3",
    "llada_moe": "llada_moe", "llada2_moe": "llada2_moe", "step/teacher_cross": "llama",
}  # fmt: skip


def test_published_configs_are_taken() -> None:
    published = json.loads(Path(__file__).with_name("published.json").read_text())
    for entry in published.values():
        meta_model(entry["architecture"], entry["config"])


def changed(golden: Path, name: str, **changes: Any) -> Any:
    """The model without weights of a golden checkpoint's config with changes."""
    config = json.loads((golden / name / "config.json").read_text())
    return meta_model(ARCHITECTURE_OF[name], {**config, **changes})


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_a_key_that_nothing_reads_is_refused_and_one_that_is_off_is_not(
    golden: Path, name: str
) -> None:
    changed(golden, name, logits_scaling=None, embedding_multiplier=0, attn_logit_softcap=False)
    # a library's own notes and dropouts change nothing
    changed(golden, name, _name_or_path="y", attn_pdrop=0.1, is_llama_config=True)
    for value in (8.0, True, [1], "on"):
        with pytest.raises(TideError, match="logits_scaling"):
            changed(golden, name, logits_scaling=value)


REFUSED: list[tuple[str, str, Any]] = [
    ("llada", "block_type", "sequential"), ("llada", "rope", False),
    ("llada", "multi_query_attention", True), ("llada_moe", "clip_qkv", 8.0),
    ("llada_moe", "partial_rotary_factor", 0.5), ("llada2_moe", "score_function", "softmax"),
    ("dream", "use_sliding_window", True), ("wedlm", "qk_norm", False),
    ("a2d_qwen3", "layer_types", ["full_attention", "sliding_attention"]),
    ("a2d_qwen3", "quantization_config", {"bits": 4}),
]  # fmt: skip


def test_what_is_not_built_is_refused_by_name(golden: Path) -> None:
    for name, key, value in REFUSED:
        with pytest.raises(TideError, match=key):
            changed(golden, name, **{key: value})


def test_every_key_of_a_llama_is_obeyed(golden: Path) -> None:
    """Of transformers' own fields none is lost: with this one the model has biases."""
    model = changed(golden, "step/teacher_cross", mlp_bias=True)
    assert any(name.endswith("up_proj.bias") for name, _ in model.named_parameters())


def test_the_published_moe_calls_itself_llada(golden: Path, tmp_path: Path) -> None:
    """Its config.json says so; repositories that load it tell their users to edit the file."""
    shutil.copy(golden / "llada_moe" / "model.safetensors", tmp_path)
    config = json.loads((golden / "llada_moe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llada"}))
    check_weights(open_checkpoint(str(tmp_path)), "llada_moe")


@pytest.fixture
def folder(random_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_teacher, tmp_path / "m"))


def refused(folder: Path, what: object) -> None:
    with pytest.raises(TideError):  # noqa: PT012
        checkpoint = open_checkpoint(str(folder))
        check_weights(checkpoint, "llama")
        load_model(checkpoint, "llama", torch.float32)
        Tokenizer.load(folder)
        pytest.fail(f"{what} was taken")


def test_an_index_that_names_what_it_should_not(folder: Path) -> None:
    names: list[Any] = ["../model.safetensors", "/dev/zero", "model.bin", "", 3]
    for index in (*({"a": name} for name in names), {}, [], None):
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, index)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_none(name: str, folder: Path) -> None:
    path = folder / name
    harms: list[tuple[Any, str]] = [(path.symlink_to, "/dev/zero"), (path.symlink_to, path.name)]
    harms += [(path.write_text, '{"a":' * 200_000)]
    path.unlink()
    os.mkfifo(path)
    refused(folder, "a pipe")
    for harm, value in harms:
        path.unlink()
        harm(value)
        refused(folder, value[:20])


def test_configs_of_no_model(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for changes in (
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 0}, {"hidden_size": 10**30},
        {"vocab_size": "many"}, {"num_attention_heads": 1.5}, {"intermediate_size": [2]},
        {"hidden_act": "os.system"}, {"rope_parameters": 3}, {"num_key_value_heads": -1},
    ):  # fmt: skip
        path.write_text(json.dumps({**config, **changes}))
        refused(folder, changes)


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), str(tmp_path), "nobody/nothing", "a\0b", "a/\0b"):
        with pytest.raises(TideError):
            open_checkpoint(place)
