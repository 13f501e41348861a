"""Preparing: once, in parts that survive kills and damage, in any number of processes."""

import json
import keyword
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.examples import Preparer
from shared.data.reading import iter_examples
from shared.settings.config import DataConfig, LengthConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.folder import PreparedData, describe, losses, show
from teacher_cache.prepared.prepare import PrepareRequest, Selector, prepare
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER

STUDENT, TEACHER = Tokenizer.load(STUDENT_TOKENIZER), Tokenizer.load(TEACHER_TOKENIZER)


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"question": f"What is {i}?", "answer": f"It is {i} and no other.", **more}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def request(folder: Path, *sources: DataConfig, **changes: Any) -> PrepareRequest:
    identity = {"student": STUDENT.fingerprint, "teacher": TEACHER.fingerprint}
    own = {"student": str(STUDENT_TOKENIZER), "teacher": str(TEACHER_TOKENIZER), "shared": False}
    own |= {"student_mask_id": 2047, "teacher_mask_id": 4095, "workers": 1}
    own |= {"lengths": LengthConfig(student=64, teacher=64, block=32), **changes}
    return PrepareRequest(sources, folder, identity, **own)


def keys(data: PreparedData) -> list[str]:
    return [example.id for example in data.between(0, data.examples)]


def parts(folder: Path) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in folder.glob("parts/*.parquet")}


def test_what_is_prepared_is_what_the_tokenizers_say(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row(i, id=i) for i in range(100)])
    asked = request(tmp_path / "p", DataConfig(str(source)))
    data = prepare(asked)
    preparer = Preparer(STUDENT, TEACHER, asked.lengths, 2047, 4095)
    expected = preparer.usable(list(iter_examples(asked.sources[0])))
    assert data.examples == 100
    for a, b in zip(data.between(0, 100), expected, strict=True):
        assert (a.id, a.label, a.shared, a.pairs) == (b.id, b.label, b.shared, b.pairs)
        for name in ("student_ids", "spans", "teacher_ids", "chunks", "offsets"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
    assert [e.id for e in data.between(95, 300)] == keys(data)[95:]


def test_a_second_run_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other limits share its parts."""
    source = write(tmp_path / "d.jsonl", [row(i) for i in range(700)])
    first = prepare(request(tmp_path / "p", DataConfig(str(source))))
    before = parts(tmp_path / "p")
    few = prepare(request(tmp_path / "p", DataConfig(str(source), limit=50)))
    half = prepare(request(tmp_path / "p", DataConfig(str(source), weight=0.5)))
    assert parts(tmp_path / "p") == before
    assert keys(few) == keys(first)[:50]
    assert set(keys(half)) < set(keys(first)) and 250 < half.examples < 450
    # Touched but not changed: it is read, and nothing is made.
    os.utime(source, ns=(1, 1))
    prepare(request(tmp_path / "p", DataConfig(str(source))))
    assert parts(tmp_path / "p") == before
    refuse = "teacher_cache.prepared.prepare.source_rows"
    monkeypatch.setattr(refuse, lambda _: pytest.fail("the source was read"))
    assert keys(prepare(request(tmp_path / "p", DataConfig(str(source))))) == keys(first)


def test_rows_that_are_mended_or_added_change_only_their_own_part(tmp_path: Path) -> None:
    rows: list[Any] = [row(i) for i in range(700)]
    source = write(tmp_path / "d.jsonl", rows)
    first = prepare(request(tmp_path / "p", DataConfig(str(source)))).record.parts
    write(source, [*rows[:300], row(9000), *rows[301:], row(9001)])
    again = prepare(request(tmp_path / "p", DataConfig(str(source))))
    assert again.examples == 701
    assert [a == b for a, b in zip(first, again.record.parts, strict=True)] == [True, False, False]


def test_what_cannot_be_used_moves_no_other_and_is_counted(tmp_path: Path) -> None:
    good: list[Any] = [row(i) for i in range(40)]
    source = write(tmp_path / "good.jsonl", good)
    clean = prepare(request(tmp_path / "p", DataConfig(str(source))))
    bad = ["{", row(50, question="w " * 900), {"x": 1}, row(51, answer="")]
    rows = [*good[:7], *bad[:2], *good[7:30], *bad[2:], *good[30:]]
    mixed = write(tmp_path / "mixed.jsonl", rows)
    data = prepare(request(tmp_path / "p", DataConfig(str(mixed))))
    assert keys(data) == keys(clean)
    assert data.record.content == clean.record.content
    (report,) = data.record.sources
    reasons = {"not JSON": 8, "prompt too long": 9, "no known form": 33, "empty response": 34}
    assert report.dropped == dict.fromkeys(reasons, 1)
    places = {reason: shown[0][0] for reason, shown in report.places.items()}
    assert places == {reason: f"{mixed}:{line}" for reason, line in reasons.items()}
    for part in ("44 (form: question_answer 42)", f"{mixed}:8: not JSON", "40 examples"):
        assert part in describe(data)
    assert "left out of 44 rows: 1 (prompt too long)" in losses(data)
    assert "⟦It is 0 and no other.<|im_end|>" in show(data.between(0, 2), STUDENT)
    with pytest.raises(TideError, match=f"{mixed}:8"):
        prepare(request(tmp_path / "p", DataConfig(str(mixed), allow_bad_rows=2.0)))


LONG = "word " * 200


@pytest.mark.parametrize("field", ["question", "answer"])
def test_what_many_rows_are_lost_to_is_a_warning(
    field: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for many in (1, 6):
        rows = [row(i, **({field: f"{i} {LONG}"} if i < many else {})) for i in range(20)]
        source = write(tmp_path / f"{many}.jsonl", rows)
        asked = request(tmp_path / "p", DataConfig(str(source)))
        said = [describe(prepare(asked)), *(r.getMessage() for r in caplog.records)]
        assert sum("lengths.student" in text for text in said) == (1 if many == 1 else 2)
        assert prepare(asked).examples == 20 - (many if field == "question" else 0)
        caplog.clear()


def test_rows_that_are_not_to_be_trained_stop_nothing_and_what_is_not_read_is_said(
    tmp_path: Path,
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [ask, {**answer, "weight": 0.5}]},
        {"messages": [ask, answer], "tools": [call]},
    ]
    source = write(tmp_path / "d.jsonl", [*rows, *(row(i, weight=0) for i in range(30))])
    data = prepare(request(tmp_path / "p", DataConfig(str(source), allow_bad_rows=0.0)))
    (report,) = data.record.sources
    assert (data.examples, report.bad, sum(report.dropped.values())) == (2, 0, 30)
    assert {"not read: `weight` of messages, in 1 conversations"} < set(losses(data))
    # Either side's template says for itself what it does not write.
    assert sorted(n for name, n in report.counts.items() if name.startswith("not written")) == [
        1,
        1,
    ]


def test_repeats_are_examples_of_their_own_or_left_out_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row(i % 3, id=0) for i in range(7)])
    data = prepare(request(tmp_path / "p", DataConfig(str(source))))
    assert len(set(keys(data))) == 7 and data.record.duplicates == 4
    assert [name.partition("#")[2] for name in keys(data)] == ["", "", "", "1", "1", "1", "2"]
    once = prepare(request(tmp_path / "p", DataConfig(str(source)), dedup=True))
    assert keys(once) == keys(data)[:3]


def test_several_sources_are_interleaved_evenly(tmp_path: Path) -> None:
    a = DataConfig(str(write(tmp_path / "a.jsonl", [row(i) for i in range(30)])))
    b = DataConfig(str(write(tmp_path / "b.jsonl", [row(100 + i) for i in range(90)])), limit=10)
    data = prepare(request(tmp_path / "p", a, b))
    ours = set(keys(prepare(request(tmp_path / "p", a))))
    sides = ["a" if key in ours else "b" for key in keys(data)]
    assert (sides.count("a"), sides.count("b")) == (30, 10)
    assert all(sides[i : i + 4].count("a") + 1 >= 3 for i in range(0, 40, 4))
    assert [source.taken for source in data.record.sources] == [30, 10]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 40), st.booleans())
def test_selection_is_a_prefix_in_order(values: list[int], limit: int, dedup: bool) -> None:
    names, selector = [f"{v:024x}" for v in values], Selector(dedup)
    selector.sources.append([])
    selector.take(0, names, DataConfig("d", limit=limit))
    entries, _ = selector.finish()
    expected, seen = [], dict.fromkeys(names, 0)
    for i, name in enumerate(names):
        if len(expected) < limit and not (dedup and seen[name]):
            expected.append([0, i, seen[name]])
        seen[name] += 1
    assert entries.tolist() == expected


@pytest.mark.slow
def test_processes_make_the_same_parts(tmp_path: Path) -> None:
    source = DataConfig(str(write(tmp_path / "d.jsonl", [row(i) for i in range(6000)])))
    one, two = (prepare(request(tmp_path / str(n), source, workers=n)) for n in (1, 2))
    assert keys(one) == keys(two)
    ours, theirs = ((tmp_path / folder / "parts").iterdir() for folder in ("1", "2"))
    assert {p.name: p.read_bytes() for p in ours} == {p.name: p.read_bytes() for p in theirs}


SCRIPT = """
import sys
from pathlib import Path
from shared.settings.config import DataConfig
from teacher_cache.prepared.prepare import prepare
from tests.teacher_cache.prepared.test_prepare import request
print(prepare(request(Path(sys.argv[2]), DataConfig(sys.argv[1]))).examples)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row(i) for i in range(6000)])
    expected = prepare(request(tmp_path / "whole", DataConfig(str(source))))
    for wanted in (2, 9):
        command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "killed")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if len(parts(tmp_path / "killed")) >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    before = parts(tmp_path / "killed")
    data = prepare(request(tmp_path / "killed", DataConfig(str(source))))
    assert keys(data) == keys(expected)
    assert before.items() <= parts(tmp_path / "killed").items()  # what was there was not made again


@pytest.mark.slow
def test_many_ranks_prepare_once(tmp_path: Path) -> None:
    """Six processes, released at one moment: one prepares, the others wait and find the same."""
    source = write(tmp_path / "d.jsonl", [row(i) for i in range(400)])
    asked = request(tmp_path / "p", DataConfig(str(source)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(6, context, initializer=context.Barrier(6).wait) as pool:
        assert set(pool.map(_rank, [asked] * 6)) == {(400, prepare(asked).record.content)}


def _rank(asked: PrepareRequest) -> tuple[int, str]:
    data = prepare(asked)
    return data.examples, data.record.content


def test_damage_is_named_or_mended(tmp_path: Path) -> None:
    source = DataConfig(str(write(tmp_path / "d.jsonl", [row(i) for i in range(300)])))
    whole = keys(prepare(request(tmp_path / "p", source)))
    path = next((tmp_path / "p").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:100])  # a record that is cut is made again
    assert keys(prepare(request(tmp_path / "p", source))) == whole
    part = next((tmp_path / "p" / "parts").iterdir())
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 1
    part.write_bytes(content)
    with pytest.raises(TideError, match=part.name):
        keys(prepare(request(tmp_path / "p", source)))
    part.unlink()  # as advised
    assert keys(prepare(request(tmp_path / "p", source))) == whole


MEASURED = """
import resource
from pipelines.cli import app
from shared.system.hardware import high_water
app(standalone_mode=False)
print(max(high_water(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.slow
def test_forty_thousand_rows(tmp_path: Path) -> None:
    stream = random.Random(0)

    def text(most: int) -> str:
        return " ".join(stream.choices(keyword.kwlist, k=stream.randint(5, most)))

    rows = [row(i, question=f"{i}: {text(30)}", answer=text(80)) for i in range(40_000)]
    write(tmp_path / "d.jsonl", rows)
    settings = ["--set", "data.limit=40000", "--set", "lengths={student=256, teacher=256}"]
    places = ["--data", str(tmp_path / "d.jsonl"), "--prepared", str(tmp_path / "p")]
    command = [sys.executable, "-c", MEASURED, "prepare", *places, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usable           40,000, taken 40,000" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 1000 << 20
