"""Model folders of strangers: refused with an explanation, and nothing of them is run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import check_weights, load_model
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer


def refused(folder: Path, what: object) -> None:
    with pytest.raises(TideError):  # noqa: PT012
        checkpoint = open_checkpoint(str(folder))
        check_weights(checkpoint, "llama")
        load_model(checkpoint, "llama", torch.float32)
        Tokenizer.load(folder)
        pytest.fail(f"{what} was taken")


@pytest.fixture
def folder(random_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_teacher, tmp_path / "m"))


def test_an_index_that_names_what_it_should_not(folder: Path) -> None:
    names: list[Any] = ["../model.safetensors", "/dev/zero", "model.bin", "", 3]
    for index in (*({"a": name} for name in names), {}, [], None):
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, index)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_none(name: str, folder: Path) -> None:
    path = folder / name
    for what in ("fifo", "device", "link to itself", "nested"):
        path.unlink()
        match what:
            case "fifo":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "link to itself":
                path.symlink_to(path.name)
            case "nested":
                path.write_text('{"a":' * 200_000)
        refused(folder, what)


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
