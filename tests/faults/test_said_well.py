"""Every command with values that cannot be: one explained error, exit code 2, before anything is computed."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import chats_file

UNWRITABLE = "/proc/x"
MAMBA = """
[mine]
model = "embedded:teacher_cache.teachers/tiny"
architecture = "mamba"
mask_id = 4095
student_tokens = true
length = 128
student = "embedded:teacher_cache.teachers/tiny"
"""


@pytest.fixture(scope="module")
def names(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands below write in braces."""
    folder = tmp_path_factory.mktemp("said")
    (folder / "mamba.toml").write_text(MAMBA)
    (folder / "empty.jsonl").write_text("")
    (folder / "useless.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "q"}]}) + "\n"
    )
    (folder / "wrong.toml").write_text("[train]\nlearning_rte = 1e-4\n")
    (folder / "table.toml").write_text("[trian]\nlearning_rate = 1e-4\n")
    (folder / "no.toml").write_text("= 3")
    (folder / "file").write_text("")
    (folder / "tiny.toml").write_text(
        f'[cache]\nteacher = "tiny-shared"\ndata = {{ source = "{chats_file()}", limit = 2 }}\n'
        f'out = "{folder / "new"}"\nengine = {{ device = "cpu" }}\n'
    )
    return {
        "S": "embedded:student_train/tiny_students/shared", "C": str(caches["tiny-shared"]), "F": str(folder),
        "T": str(folder / "tiny.toml"), "O": str(folder / "out"), "X": UNWRITABLE,
    }  # fmt: skip


TRAIN = "train --teacher tiny-shared --cache {C} --out {O} --set device=cpu --set max_steps=1 "
CACHE = "cache --config {T} "
COMMANDS = [
    # devices and architectures
    *(f"{CACHE} {extra} --set engine.device={device}" for device in ("gpu", "cuda", "cuda:7", "mps", "tpu", "")
      for extra in ("", "--dry-run")),
    "cache --teacher mine --teachers {F}/mamba.toml --out {O}",
    "cache --teacher mine --teachers {F}/mamba.toml --dry-run",
    # places
    *(f"{CACHE} {extra} --out {{X}}" for extra in ("", "--dry-run")),
    *(f"{CACHE} {extra} --out {{F}}/file" for extra in ("", "--dry-run")),
    *(f"{CACHE} {extra} --store foo://x" for extra in ("", "--dry-run")),
    *(f"{CACHE} {extra} --metrics-file {{F}}/none/m.prom" for extra in ("", "--dry-run")),
    *(f"{CACHE} {extra} --data {{F}}/{name}" for extra in ("", "--dry-run")
      for name in ("empty.jsonl", "useless.jsonl", "none.jsonl")),
    "prepare --config {T} --data {F}/none.jsonl", "prepare --config {T} --prepared {X}",
    TRAIN + "--out {X}", TRAIN + "--out {F}/file", "train --cache {F}/none --out {O}",
    "train --cache foo://x --out {O}",
    "plan --gpu none",
    "compare {F}/none {F}/none", "compare {F} {F}",
    TRAIN + "--set draws_per_step=99", TRAIN + "--set draws_per_step=0", TRAIN + "--set loader_workers=-2",
    TRAIN + "--set compile=maybe",
    "demo --out {X}", "demo --seeds 0", "tiny-teacher --work {X}", "tiny-student --work {X}",
    "tiny-student --only other",
    "serve {F}/none", "serve {F}", "serve {S} --port 99999", "serve {S} --batch 0", "serve {S} --host nowhere.invalid",
    "serve {S} --threshold 2", "serve {S} --waiting -1", "serve {S} --device gpu --port 0",
    "publish {F}/none hf://a/b", "publish {S} a/b", "publish {F} hf://a/b --dry-run",
    "export {S} {X}", "export {S} {F}", "export {F}/none {O}", "export {S} {O} --format gguf",
    "pack {C} {X}", "pack {F}/none {F}/a", "unpack {F}/none {O}", "unpack {F}/file {X}", "push {C} foo://x",
    "pull foo://x {O}", "pull {F}/none {O}", "merge {C} --out {O}", "merge {C} {F}/none --out {O}",
    "merge {C} {C} --out {X}", "prune {C} --out {X} --k 4",
    *(f"prune {{C}} --out {{O}} --{name} {value}" for name in ("k", "classes", "draws") for value in (0, -1, 10**9)),
    "inspect {F}/none", "inspect {C} --row none", "inspect {C} --row 99999999999999999999",
    "inspect {C} --row 0 --draw 99",
    "inspect {C} --picture {X}", "verify --cache {F}/none", "verify --config {T} --cache {C} --rows -1",
    # settings
    TRAIN + "--seed -1", TRAIN + "--seed 99999999999999999999", TRAIN + "--set student.heads=5",
    TRAIN + "--set student.heads=0", TRAIN + "--set distillation.type=none", TRAIN + "--set distillation.type=odd",
    TRAIN + "--set learning_rate=nan", TRAIN + "--set learning_rate=inf", TRAIN + "--set epochs=nan",
    TRAIN + "--set weight=nan", TRAIN + "--set learning_rte=1e-4",
    TRAIN + "--set heldout_draws=0", TRAIN + "--set eval_steps=0", TRAIN + "--set warmup_ratio=2",
    TRAIN + "--set student.checkpoint={F}", TRAIN + "--set cache.x=1", TRAIN + "--set =1", TRAIN + "--set x",
    TRAIN + "--config {F}/wrong.toml", TRAIN + "--config {F}/no.toml", TRAIN + "--config {F}/none.toml",
    "cache --config {F}/wrong.toml", "cache --config {F}/table.toml", "cache --config {F}/no.toml",
    *(CACHE + f"--set {setting}" for setting in (
        "noise.drwas=2", "noise.draws=0", "noise.demo_ratio=nan", "noise.seed=-1", "targets.k=0", "targets.k=999999",
        "targets.temperatures=[nan]", "targets.temperatures=[inf]", "targets.classes=0", "lengths.student=0",
        "lengths.block=0", "lengths.student=1000000", "shard_examples=0", "rank=3", "world=0", "data.limit=-1",
        "engine.data_parallel=0", "engine.tokens_per_batch=0", "engine.type=odd", "engine.dtype=int8", "noise=3",
        "prepare_workers=-1", "student_mask_token=", "teacher=none", "targets.mass=nan")),
    CACHE + "--teacher llada", "teachers show none", "recipes show none", "recipes show cross --against none",
    # numbers on the command line
    "sample {S} hi --batch 0", "sample {S} hi --new-tokens 0", "sample {S} hi --steps-per-block 0",
    "sample {S} hi --threshold 2", "sample {S} hi --temperature -1", "sample {S} hi --temperature nan",
    "sample {S} hi --block 0", "sample {S} hi --top-k 0", "sample {S} hi --top-p 2",
    "sample {S} hi --device gpu", "sample {S} hi --remasking odd", "sample {F}/none hi",
    "sample {S} --file {F}/none", "sample {S} --file {F}/empty.jsonl", "chat {S} --new-tokens 0", "chat {F}/none",
    *(f"plan --{name} {value}" for name in ("examples", "tokens", "response", "tflops", "mfu", "tokens-per-second")
      for value in (0, -1)),
    "plan --gpu-hour -1", "plan --terabyte-month -1", "plan --tokens-per-second nan", "plan --mfu 2", "plan --draws 0",
    *(f"throughput --{name} 0" for name in ("length", "requests", "rounds", "tflops")),
    *(f"fidelity --{name} 0" for name in ("k", "classes", "examples", "temperature")), "fidelity --tail odd",
    "fidelity --teacher tiny-cross", "fidelity --objective odd", "ablate {F}/none.toml", "ablate {F}/no.toml",
    "ablate {F}/tiny.toml", "replay {F}/none", "replay {F}", "report {F}/none",
    "bench --only odd",
    "eval {S} --tasks none", "eval {S} --tasks humaneval --batch 0", "eval {S} --tasks humaneval --code-seconds 0",
    "eval {S} --tasks humaneval --code-gigabytes nan", "eval {S} --tasks humaneval --data x",
    "eval {S} --tasks gsm8k --data gsm8k={F}/none", "eval {F}/none --tasks gsm8k",
    "eval {S} --tasks gsm8k --output {X}",
]  # fmt: skip


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """Exit code and stderr of `tide ARGUMENTS`."""
    from pipelines.cli import main

    err = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["tide", *arguments])
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, err.getvalue()


def test_every_command_is_among_them() -> None:
    """But `env`, which takes nothing, and `lm-eval`, whose options are lm-eval's."""
    from pipelines.commands.app import PANELS

    every = {name for names in PANELS.values() for name in names}
    assert every - {command.split()[0] for command in COMMANDS} == {"env", "lm-eval"}


@pytest.mark.faults("values that cannot be, by command")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_one_explained_error(
    command: str, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run([word.format(**names) for word in command.split()], monkeypatch)
    assert code == 2, said
    assert [line.startswith("tide: error") for line in said.splitlines()].count(True) == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [CACHE + "--dry-run", CACHE, TRAIN + "--set batch_size=2"])
@pytest.mark.filterwarnings("ignore")
def test_without_such_values_the_same_commands_work(
    command: str, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run(
        [word.format(**{**names, "O": str(tmp_path / "o")}) for word in command.split()],
        monkeypatch,
    )
    assert code in (0, None), said


@pytest.mark.faults("values that cannot be, by command")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (TRAIN + "--set learning_rte=1e-4", "did you mean learning_rate?"),
        (TRAIN + "--set student.head=5", "did you mean heads"),
        (TRAIN + "--set distillation.temprature=5", "did you mean temperature"),
        ("cache --config {F}/wrong.toml", "did you mean learning_rate?"),
        ("cache --config {F}/table.toml", "did you mean train?"),
        (CACHE + "--set noise.drwas=2", "did you mean draws?"),
        (CACHE + "--set data.limt=2", "did you mean limit"),
        (CACHE + "--set zzz=2", "there are data, dedup"),
        ("cache --teacher tiny-shred", "did you mean tiny-shared"),
    ],
)
def test_the_nearest_name_is_said(
    command: str, words: str, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, said = run([word.format(**names) for word in command.split()], monkeypatch)
    assert words in said


@pytest.mark.faults("values that cannot be, by command")
@pytest.mark.parametrize("visible", ["0,1", "0", "3,5,7"])
def test_copies_beyond_the_visible_gpus_do_not_run_on_the_cpu(
    visible: str, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    for extra in ([], ["--dry-run"]):
        words = [
            "cache",
            "--config",
            names["T"],
            "--set",
            "engine.device=auto",
            "--data-parallel",
            "4",
            *extra,
        ]
        code, said = run(words, monkeypatch)
        assert code == 2 and f"CUDA_VISIBLE_DEVICES={visible}" in said
