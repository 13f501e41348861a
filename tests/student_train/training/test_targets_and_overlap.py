"""What a training run is warned of before it begins: nothing to learn from, and held-out rows that
are trained on.
"""

import json
from pathlib import Path

import pytest

from shared.data import iter_examples
from shared.settings.config import DataConfig
from student_train.training.trainer import make_trainer, train_student
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, small_cache_config, write_chats
from tests.reading import all_rows
from tests.student_train.training.test_trainer import config


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
    data = {**split, "split": "train"}
    build_cache(small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=data))
    heldout = {**split, "split": "heldout"}
    make_trainer(config(tmp_path / "c", tmp_path / "r", heldout=heldout))
    examples = iter_examples(DataConfig(source, split="heldout", heldout_share=0.3))
    ours = {example.id.partition("#")[0] for example in examples}
    theirs = {row.example_id.partition("#")[0] for row in all_rows(tmp_path / "c")}
    assert len(ours) + len(theirs) == 40 and not ours & theirs and ours


def test_all_answers_of_conversations_from_chats_to_a_student(
    random_teacher: Path, tmp_path: Path
) -> None:
    turns = ["user", "assistant", "user", "assistant", "user"]  # nobody answers the last
    lines = []
    for i in range(24):
        messages = [{"role": role, "content": f"{j} = {i} + {j}"} for j, role in enumerate(turns)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "d.jsonl").write_text("".join(lines))
    data = {"source": str(tmp_path / "d.jsonl"), "turns": "all"}
    build_cache(small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=data))
    masked_in_first = 0
    for row in all_rows(tmp_path / "c"):
        assert len(row.spans) == 2
        inside = {p for a, b in row.spans.tolist() for p in range(a, b)}
        assert set(row.masked.tolist()) <= inside
        assert row.teacher_ids is not None and row.teacher_masked is not None
        assert row.teacher_masked.max(initial=0) < len(row.teacher_ids)
        masked_in_first += int((row.masked < row.spans[0, 1]).sum())
    assert masked_in_first > 0
    how = {"distillation": {"type": "reverse_calm"}, "max_steps": 4, "heldout": None}
    train_student(config(tmp_path / "c", tmp_path / "r", **how))
