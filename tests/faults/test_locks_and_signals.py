"""Two programs in one folder, programs that are told to stop, and programs whose parent is gone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from shared.system.errors import TideError
from shared.system.processes import hold
from tests.conftest import chats_file
from tests.pipelines.evaluation.test_sandbox import processes_with

SECONDS = 60


@contextlib.contextmanager
def started(*arguments: str, until: Path) -> Iterator[subprocess.Popen[str]]:
    """`tide ARGUMENTS`, once a file below `until`'s folder matches its name."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 2 * SECONDS
        while not any(until.parent.rglob(until.name)) if until.parent.exists() else True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def training(cache: Path, out: Path) -> list[str]:
    """A run that takes long."""
    settings = "max_steps=4000 epochs=400 batch_size=4 checkpoint_steps=5 log_steps=5 device=cpu"
    settings += " student.layers=1 student.hidden_size=32"
    command = ["train", "--teacher", "tiny-shared", "--cache", str(cache), "--out", str(out)]
    return command + [word for setting in settings.split() for word in ("--set", setting)]


def grid(folder: Path) -> list[str]:
    """Of an ablation that takes long."""
    recipe = folder / "grid.toml"
    recipe.write_text(
        'seeds = [0, 1]\n[caches.c]\nteacher = "tiny-cross"\n'
        f'data = {{ source = "{chats_file()}", limit = 24 }}\n'
        "lengths = { student = 128, teacher = 128 }\n[train]\nmax_steps = 4000\nepochs = 400\n"
        "batch_size = 4\ncheckpoint_steps = 5\nlog_steps = 5\n"
        '[variants.plain]\ncache = "c"\n'
    )
    return ["ablate", str(recipe), "--out", str(folder / "grid")]


@contextlib.contextmanager
def holder(lock: Path, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock."""
    code = (
        "import time\nfrom pathlib import Path\nfrom shared.system.processes import hold\n"
        f"{before}\n"
        f"with hold(Path({str(lock)!r}), 'it'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


NO_FLOCK = """
import errno, os
from filelock import FileLock
def none(self, *_, **__):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
FileLock.acquire = none
"""


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_is_held_by_one_and_free_once_that_was_killed(
    flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system has no flock: then a file stands for the lock."""
    lock = tmp_path / "new" / ".lock"
    if not flock:
        monkeypatch.setattr(FileLock, "acquire", FileLock.acquire)  # given back at the end
        exec(NO_FLOCK, {})
    with holder(lock, "" if flock else NO_FLOCK) as process:
        refused = pytest.raises(TideError, match=str(process.pid))
        with refused, hold(lock, "it"):
            pass
    with hold(lock, "it"), pytest.raises(TideError, match=str(os.getpid())), hold(lock, "it"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_children_of_an_ablation_end_with_it(sign: signal.Signals, tmp_path: Path) -> None:
    command = grid(tmp_path)
    with started(*command, until=tmp_path / "grid" / "progress.json") as process:
        assert processes_with(str(tmp_path / "grid" / "plain-seed0"))
        os.kill(process.pid, sign)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
        assert "Traceback" not in said
        deadline = time.monotonic() + 30
        while (
            processes_with(str(tmp_path / "grid" / "plain-seed0")) and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        assert processes_with(str(tmp_path / "grid" / "plain-seed0")) == []
    with started(*command, until=tmp_path / "grid" / "progress.json"):
        pass  # nobody holds the folder any more


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_stops_in_order(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    command = training(caches["tiny-shared"], tmp_path / "run")
    with started(*command, until=tmp_path / "run" / "checkpoints" / "COMPLETE") as first:
        second = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *command], capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
        assert second.returncode == 2
        assert f"process {first.pid} of" in second.stderr
        first.terminate()
        _, said = first.communicate(timeout=SECONDS)
    assert first.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("signs", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_a_cache_that_is_told_to_stop_says_so_in_its_status(
    signs: tuple[signal.Signals, ...], random_teacher: Path, tmp_path: Path
) -> None:
    settings = "shard_examples=1 lengths.student=128 lengths.teacher=128 engine.device=cpu"
    command = ["cache", "--teacher", "tiny-shared", "--draws", "100", "--data", str(chats_file())]
    command += ["--model", str(random_teacher), "--out", str(tmp_path / "c")]
    command += [word for setting in settings.split() for word in ("--set", setting)]
    with started(*command, until=tmp_path / "c" / "part-*.parquet") as process:
        for number, sign in enumerate(signs):
            time.sleep(0.05 * number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, sign)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signs[0]
    assert "Traceback" not in said
    if len(signs) == 1:
        assert json.loads((tmp_path / "c" / "status.json").read_text())["state"] == "stopped"
    assert not list((tmp_path / "c").glob(".student_tokenizer-*"))


def test_a_prune_that_was_killed_before_its_manifest_goes_on(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    from shared.system.files import write_bytes
    from teacher_cache.maintenance.derive import prune_cache

    for file in (caches["tiny-shared"] / "student_tokenizer").iterdir():
        write_bytes(tmp_path / "p" / "student_tokenizer" / file.name, file.read_bytes())
    assert prune_cache(caches["tiny-shared"], tmp_path / "p", k=4).fingerprint.targets.k == 4
