"""What a training run is warned of before it begins: nothing to learn from, and held-out rows that
are trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.cache.shards import finished_units
from shared.data import iter_examples
from shared.settings.config import DataConfig
from shared.settings.objectives import KL, Calm, NoDistillation, ReverseCalm
from shared.system.errors import TideError
from student_train.training.preflight import check_chunks
from student_train.training.trainer import make_trainer, train_student
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, small_cache_config, write_chats
from tests.reading import rows_in
from tests.student_train.training.test_trainer import config


def test_an_objective_whose_targets_are_absent_is_refused_or_loudly_said() -> None:
    for objective in (Calm(), ReverseCalm()):
        check_chunks(objective, Path("c"), rows=10, bare=3)
        with pytest.warns(UserWarning, match="6 of 10"):
            check_chunks(objective, Path("c"), rows=10, bare=6)
        with pytest.raises(TideError):
            check_chunks(objective, Path("c"), rows=10, bare=10)
    for other in (NoDistillation(), KL()):
        check_chunks(other, Path("c"), rows=10, bare=10)


def test_held_out_rows_that_are_trained_on_are_counted(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    overlapping = {"source": str(chats_file()), "limit": 30}  # 24 of them are in the cache
    with pytest.warns(UserWarning, match="24 of 30"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r", heldout=overlapping))


def test_a_split_by_content_shares_nothing(random_teacher: Path, tmp_path: Path) -> None:
    """Without a warning, which would be an error here; repeats fall on one side."""
    source = write_chats(tmp_path / "d.jsonl", [f"x = {i % 40}" for i in range(80)])["source"]
    split = {"source": source, "heldout_share": 0.3}
    cache = small_cache_config(
        "tiny-cross", random_teacher, tmp_path / "c", data={**split, "split": "train"}
    )
    build_cache(cache)
    heldout = {**split, "split": "heldout"}
    make_trainer(config(tmp_path / "c", tmp_path / "r", heldout=heldout))
    ours = {
        e.id.partition("#")[0]
        for e in iter_examples(DataConfig(source, split="heldout", heldout_share=0.3))
    }
    theirs = {row.example_id.partition("#")[0] for row in rows_of(tmp_path / "c")}
    assert len(ours) + len(theirs) == 40 and not ours & theirs and ours


def rows_of(cache: Path) -> list:
    return [row for unit in finished_units(cache) for row in rows_in(cache, unit)]


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_all_answers_of_conversations_from_chats_to_a_student(
    teacher: str, random_teacher: Path, tmp_path: Path
) -> None:
    rows = []
    for i in range(24):
        chat = [("user", f"first {i}"), ("assistant", f"a = {i}"), ("user", "and then?"), ("assistant", f"b = {i} + 1"),
                ("user", "nobody answers this")]  # fmt: skip
        rows.append({"messages": [{"role": role, "content": content} for role, content in chat]})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "d.jsonl"), "turns": "all"}
    build_cache(small_cache_config(teacher, random_teacher, tmp_path / "c", data=data))
    found = rows_of(tmp_path / "c")
    assert {len(row.spans) for row in found} == {2}
    for row in found:
        inside = {p for a, b in row.spans.tolist() for p in range(a, b)}
        assert set(row.masked.tolist()) <= inside
        if row.teacher_ids is not None and row.teacher_masked is not None:
            assert row.teacher_masked.max(initial=0) < len(row.teacher_ids)
    masked_in_first = sum(((row.masked < row.spans[0, 1]).sum() for row in found), 0)
    assert masked_in_first > 0
    objective = {"type": "reverse_calm"} if teacher == "tiny-cross" else {"type": "kl"}
    metrics = train_student(
        config(tmp_path / "c", tmp_path / "r", distillation=objective, max_steps=4, heldout=None)
    )
    assert metrics["seconds"] > 0


def test_tool_calls_that_the_templates_drop_never_become_empty_answers(
    random_teacher: Path, tmp_path: Path
) -> None:
    user = {"role": "user", "content": "Weather?"}
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": [user, a]}) + "\n" for a in answers))
    with pytest.raises(TideError, match="tool_calls"):
        build_cache(
            small_cache_config(
                "tiny-cross", random_teacher, tmp_path / "c", data={"source": str(path)}
            )
        )
    assert not list((tmp_path / "c").glob("draw=*"))
