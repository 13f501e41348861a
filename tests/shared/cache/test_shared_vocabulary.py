"""Teachers of the student's tokenizer family: the same ordinary tokens, other added ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.cache.shards import Unit
from shared.models.checkpoint import resolve
from shared.system.errors import Unusable
from shared.text.tokenizers import Tokenizer
from teacher_cache.run.build import build_cache
from tests.conftest import TEACHER_TOKENIZER, small_cache_config, write_chats
from tests.reading import rows_in
from tests.shared.aligned.test_examples import LENGTHS, chat

TEMPLATE = """
{%- for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>
{% if message['role'] == 'assistant' %}<think>

</think>

{% endif %}{{ message['content'] }}<|eot_id|>{% endfor %}"""


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer with two tokens of the student's own, one of them in the prompt."""
    folder = tmp_path_factory.mktemp("thinking") / "t"
    backend = Tokenizer.load(TEACHER_TOKENIZER).backend
    backend.add_tokens(["<think>", "</think>"])  # tokens, but no control tokens, as Qwen has them
    backend.chat_template = TEMPLATE
    backend.save_pretrained(folder)
    return folder


def preparer(student: Tokenizer) -> Preparer:
    same = SharedVocabulary.between(student, Tokenizer.load(TEACHER_TOKENIZER))
    return Preparer(student, same, LENGTHS, student.special_id("mask"))


def test_a_token_of_the_students_own_is_written_out_in_a_prompt_and_refused_in_an_answer(
    thinking: Path,
) -> None:
    student, teacher = Tokenizer.load(thinking), Tokenizer.load(TEACHER_TOKENIZER)
    p, left_out = preparer(student)([chat("x = 1"), chat("a <think> b")])
    assert isinstance(p, Prepared) and p.teacher_ids is not None
    assert p.shared
    assert (p.offsets > 0).all()
    assert 4096 in p.student_ids[: p.spans[0, 0]]
    assert p.teacher_ids.max() < 4096
    assert teacher.decode(p.teacher_ids.tolist()) == student.decode(p.student_ids.tolist())
    places = p.asked(p.maskable)[1]
    assert np.array_equal(p.teacher_ids[places], p.student_ids[p.maskable])
    assert isinstance(left_out, Unusable)
    (same,) = preparer(teacher).usable([chat("x")])  # the same ids need no second sequence
    assert same.shared and same.teacher_ids is None


def test_the_cache_reads_the_right_positions(
    thinking: Path, random_teacher: Path, tmp_path: Path
) -> None:
    data = write_chats(tmp_path / "d.jsonl", ["x = 1 + 2 + 3", "def f():\n    return 1"])
    changes = {"data": data, "student_tokenizer": str(thinking)}
    build_cache(small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes))
    for row in rows_in(tmp_path / "c", Unit(0, 0)):
        assert row.teacher_ids is not None and row.teacher_masked is not None
        assert np.array_equal(row.teacher_ids[row.teacher_masked], row.student_ids[row.masked])
        assert row.topk_ids is not None
        assert row.topk_ids.max(initial=0) < 4096


def test_ids_that_mean_something_else_never_enter_the_top_k(
    random_teacher: Path, tmp_path: Path
) -> None:
    """A student whose added tokens carry other names: the teacher's logits there are tail."""
    folder = Path(shutil.copytree(resolve("embedded:teacher_cache.teachers/tiny"), tmp_path / "s"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text().replace("<|start_header_id|>", "<|other|>"))
    student = Tokenizer.load(folder)
    same = SharedVocabulary.between(student, Tokenizer.load(TEACHER_TOKENIZER)).same
    changed = student.special_id("x", "<|other|>")
    assert np.flatnonzero(~same).tolist() == [changed]
    data = write_chats(tmp_path / "d.jsonl", ["x = 1 + 2 + 3"] * 3)
    changes = {"data": data, "student_tokenizer": str(folder), "targets": {"k": 4095}}
    build_cache(small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes))
    rows = [r for r in rows_in(tmp_path / "c", Unit(0, 0)) if r.masked.size]
    assert rows
    for row in rows:
        assert row.topk_ids is not None
        assert changed not in row.topk_ids.tolist()
        assert len(set(row.topk_ids[:4095].tolist())) == 4095
