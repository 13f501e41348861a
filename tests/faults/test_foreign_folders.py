"""Folders of strangers: models, manifests, runs. Refused within seconds, with an explanation; nothing is run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.cache.manifest import checksum_of, load_manifest
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import check_weights, load_model
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer

SECONDS = 12


@contextmanager
def explained(match: str | None = None) -> Iterator[None]:
    """TideError, and soon."""
    began = time.monotonic()
    with pytest.raises(TideError, match=match):
        yield
    assert time.monotonic() - began < SECONDS


def model(random_teacher: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(random_teacher, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def index(folder: Path, names: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def load(folder: Path) -> None:
    import torch

    checkpoint = open_checkpoint(str(folder))
    check_weights(checkpoint, "llama")
    load_model(checkpoint, "llama", torch.float32)


@pytest.mark.faults("model folders of strangers")
@pytest.mark.parametrize(
    "names",
    [{"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": "/dev/zero"}, {"a": "x/model.safetensors"}, {"a": 3},
     {"a": None}, {"a": "model.bin"}, {"a": ""}, {"a": ".."}, {}, [], 3, None, {"a": ["model.safetensors"]},
     {"a": "model.safetensors\0"}],
    ids=str,
)  # fmt: skip
def test_an_index_that_names_what_it_should_not(
    names: Any, random_teacher: Path, tmp_path: Path
) -> None:
    folder = model(random_teacher, tmp_path / "m")
    index(folder, names)
    with explained():
        load(folder)


def to_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def to_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def to_itself(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def to_deep(path: Path) -> None:
    path.write_text('{"a":' * 200_000)


def to_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.faults("model folders of strangers")
@pytest.mark.parametrize("change", [to_fifo, to_zeros, to_itself, to_deep, to_list])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_files_that_are_none(
    name: str, change: Callable[[Path], None], random_teacher: Path, tmp_path: Path
) -> None:
    folder = model(random_teacher, tmp_path / "m")
    change(folder / name)
    harmless = name == "chat_template.jinja" and change in (
        to_deep,
        to_list,
    )  # any text is a template
    if harmless:
        Tokenizer.load(folder)
        return
    with explained():
        load(folder)
        Tokenizer.load(folder)


@pytest.mark.faults("model folders of strangers")
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads",
                                "num_key_value_heads", "intermediate_size")
     for value in (10**9, 10**30, -1, 1.5, "many", [2], True)]
    + [("rope_parameters", 3), ("rope_parameters", {"rope_type": "odd", "rope_theta": 1.0}),

       ("hidden_act", "os.system"), ("head_dim", "x"), ("rms_norm_eps", "x"),
       ("num_hidden_layers", 0)],
)  # fmt: skip
def test_configs_of_no_model(name: str, value: Any, random_teacher: Path, tmp_path: Path) -> None:
    with explained():
        load(model(random_teacher, tmp_path / "m", **{name: value}))


def without(place: str) -> Callable[[dict[str, Any]], None]:
    def change(fingerprint: dict[str, Any]) -> None:
        section, _, name = place.partition(".")
        if name:
            del fingerprint[section][name]
        else:
            del fingerprint[section]

    return change


HOSTILE: list[tuple[str, Any]] = [
    *((f"parts={v}", {"parts": v}) for v in (10**12, 10**7, -1, 1.5, "3", None, True, 0)),
    *((f"draws={v}", {"draws": v}) for v in (10**12, 101, 0, -1, "2", None, 1.5)),
    *((f"examples={v}", {"examples": v}) for v in (10**30, -1, "24", None, 0)),
    *((f"schema_version={v}", {"schema_version": v}) for v in ("4", None, 4.0, True, [4], 10**30)),
    *((f"fingerprint={v}", {"fingerprint": v}) for v in (None, [], "x", {})),
    *((f"targets.{k}={v}", {f"targets.{k}": v}) for k, v in [
        ("temperatures", []), ("temperatures", [0.0]), ("temperatures", [float("nan")]), ("temperatures", "12"),
        ("temperatures", [1.0] * 10**5), ("k", -1), ("k", 10**12), ("k", "8"), ("classes", 0), ("classes", 10**9),
        ("values", "pickle"), ("signals", []), ("signals", ["topk"] * 1000), ("signals", "topk"), ("tail", "odd"),
        ("partial", "yes"), ("mass", 2.0)]),
    *((f"lengths.{k}={v}", {f"lengths.{k}": v}) for k, v in [
        ("student", 0), ("student", "128"), ("block", 0), ("block", -32), ("block", 10**30), ("teacher", None)]),
    *((f"student.{k}={v}", {f"student.{k}": v}) for k, v in [
        ("mask_id", -1), ("mask_id", 10**12), ("mask_id", "4095"), ("vocabulary", 0), ("vocabulary", 10**12),
        ("tokenizer", None), ("tokenizer", "x" * 10**6)]),
    *((f"teacher.{k}={v}", {f"teacher.{k}": v}) for k, v in [
        ("student_tokens", 1), ("student_tokens", None), ("attention", "full"), ("mask_id", None), ("vocabulary", -1)]),
    *((f"noise.{k}={v}", {f"noise.{k}": v}) for k, v in [("demo_ratio", 7.0), ("comp_demo", "no"), ("seed", "0")]),
    *((f"no {place}", without(place)) for place in (
        "targets", "lengths", "student", "teacher", "noise", "engine", "data", "targets.k", "lengths.block",
        "teacher.name", "student.mask_id")),
    ("tables=3", {"tables": 3}),
]  # fmt: skip


@pytest.mark.faults("manifests of strangers")
@pytest.mark.parametrize(("what", "change"), HOSTILE, ids=[name[:60] for name, _ in HOSTILE])
def test_manifests_that_cannot_be(
    what: str, change: Any, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Each with a checksum that holds."""
    values = load_manifest(caches["tiny-shared"]).to_json()
    if callable(change):
        change(values["fingerprint"])
    else:
        for place, value in change.items():
            section, _, name = place.partition(".")
            if name:
                values["fingerprint"][section][name] = value
            elif place in values:
                values[place] = value
            else:
                values["fingerprint"][place] = value
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "checksum": checksum_of(values)}))
    with explained():
        load_manifest(tmp_path)


@pytest.mark.faults("manifests of strangers")
@pytest.mark.parametrize("change", [to_fifo, to_zeros, to_itself, to_deep, to_list])
def test_manifests_that_are_no_files(change: Callable[[Path], None], tmp_path: Path) -> None:
    change(tmp_path / "manifest.json")
    with explained():
        load_manifest(tmp_path)


@pytest.mark.faults("manifests of strangers")
@pytest.mark.parametrize(
    "text", ["", "{}", "null", "3", '"x"', "[1]", '{"draws": 1}', '{"a": NaN}', "\0", "\ud800"]
)
def test_manifests_that_are_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with explained():
        load_manifest(tmp_path)
