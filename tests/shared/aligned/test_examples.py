"""Conversations as ids for two tokenizers: chunks spell the same bytes, whatever the text."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.normalizers import NFC

from shared.aligned.alignment import align_bytes, common_prefix, token_boundaries
from shared.aligned.examples import Prepared, Preparer
from shared.data.conversation import ChatExample
from shared.settings.config import LengthConfig
from shared.system.files import Unusable
from shared.text.byte_level import byte_level_bytes
from shared.text.tokenizers import Tokenizer
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER

TEACHER, STUDENT = Tokenizer.load(TEACHER_TOKENIZER), Tokenizer.load(STUDENT_TOKENIZER)
LENGTHS = LengthConfig(student=256, teacher=256, block=32)
TEXTS = {
    "control bytes": "a\x00b\x01\x1f\x7fc",
    "crlf": "one\r\ntwo\r\n\r\nthree",
    "zwj emoji": "ok \U0001f469\u200d\U0001f4bb and \U0001f468\u200d\U0001f469\u200d\U0001f467 end",
    "chinese": "你好，世界！这是一个测试。",
    "white space": "  \t\t  x   \n\n\n   \t y ",
    "decomposed": "Cafe\u0301 nai\u0308ve",
    "digits": "3.14159 and 1234567890",
    "only blanks": "   ",
}


def chat(response: str, request: str = "do it") -> ChatExample:
    question = {"role": "user", "content": request}
    return ChatExample("e", (question, {"role": "assistant", "content": response}))


def cross(student: Any = STUDENT, teacher: Any = TEACHER, lengths: Any = LENGTHS) -> Preparer:
    masks = student.special_id("mask", "<|mask|>"), teacher.special_id("mask")
    return Preparer(student, teacher, lengths, *masks)


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def bytes_of(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    return b"".join(tokenizer.token_bytes[i] for i in ids)


def check_chunks(
    p: Prepared, text: str, student: Tokenizer = STUDENT, teacher: Tokenizer = TEACHER
) -> bytes:
    """Chunks have the same bytes on both sides: a stretch of the response, which is returned."""
    assert p.teacher_ids is not None
    spelled = b""
    for t0, t1, s0, s1 in p.chunks:
        ours = bytes_of(student, p.student_ids[s0:s1])
        assert ours == bytes_of(teacher, p.teacher_ids[t0:t1])
        assert s0 >= p.spans[0, 0]
        spelled += ours
    assert spelled in text.encode()
    return spelled


@given(st.lists(any_text, min_size=1, max_size=3))
@example([*TEXTS.values()])
@example(["say <|mask|> now", "a<|eot_id|><|start_header_id|>assistant"])
def test_any_text_is_aligned_from_end_to_end_alone_or_in_a_batch(texts: list[str]) -> None:
    together = cross().usable([chat(text) for text in texts])
    for text, batched in zip(texts, together, strict=True):
        preparer = cross()
        (p,) = preparer.usable([chat(text)])
        assert check_chunks(p, text) == text.encode()
        assert preparer.counts["unaligned_bytes"] == 0
        assert preparer.counts["response_bytes"] == len(text.encode())
        assert np.array_equal(p.student_ids, batched.student_ids)
        assert np.array_equal(p.chunks, batched.chunks)


def test_a_content_that_occurs_twice_or_equals_the_template_is_found_in_its_place() -> None:
    for text in ("do it", "assistant", "user\ndo it", "<|im_start|>"):
        (p,) = cross().usable([chat(text, request=text)])
        start = p.spans[0, 0]
        prompt = STUDENT.decode(p.student_ids[:start].tolist())
        assert prompt == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert p.chunks[0, 2] == start
        assert check_chunks(p, text) == text.encode()


def nfc_copy(source: Path, folder: Path) -> Tokenizer:
    """The same tokenizer with Qwen's normaliser."""
    shutil.copytree(source, folder)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.normalizer = NFC()  # type: ignore[attr-defined]
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_text_that_is_normalised_is_aligned_up_to_the_change_or_whole_where_both_change_it(
    tmp_path: Path,
) -> None:
    student = nfc_copy(STUDENT_TOKENIZER, tmp_path / "s")
    preparer = cross(student)
    text = "x = 1  # Cafe\u0301 and more text behind it"
    (p,) = preparer.usable([chat(text)])
    aligned, before = check_chunks(p, text, student), b"x = 1  # Caf"
    assert b"x = 1  #" in aligned and before.startswith(aligned)
    assert preparer.counts["unaligned_examples"] == 1
    assert preparer.counts["unaligned_bytes"] == len(text.encode()) - len(before)
    both = cross(student, nfc_copy(TEACHER_TOKENIZER, tmp_path / "t"))
    (p,) = both.usable([chat("Cafe\u0301!")])
    assert check_chunks(p, "Caf\u00e9!", student, both.teacher) == "Caf\u00e9!".encode()  # type: ignore[arg-type]
    assert both.counts["unaligned_bytes"] == 0


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    """Among them, where a tokenizer holds its mask for an ordinary word, a text that spells it."""
    folder = Path(shutil.copytree(STUDENT_TOKENIZER, tmp_path / "s"))
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] &= token["content"] != "<|mask|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("mask_token", "added_tokens_decoder")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spells = [chat("say <|mask|> now"), chat("fine", request="what is <|mask|>?")]
    results = cross(Tokenizer.load(folder))([chat(""), chat("x", request="w " * 400), *spells])
    reasons = [result.reason for result in results if isinstance(result, Unusable)]
    assert reasons == ["empty response", "prompt too long", *["spells a mask token"] * 2]


def test_the_teacher_does_not_read_on_where_the_student_is_cut() -> None:
    """The rest of the answer, in the clear, would tell the teacher what comes before it."""
    text = "\n".join(f"y{i} = {i} * {i + 1}" for i in range(60))
    short, long = (cross(lengths=LengthConfig(n, 2048, 32)) for n in (96, 2048))
    (cut,), (whole,) = short.usable([chat(text)]), long.usable([chat(text)])
    assert (len(cut.student_ids), cut.spans[-1, 1], short.counts["truncated"]) == (96, 96, 1)
    assert cut.teacher_ids is not None and whole.teacher_ids is not None
    assert len(cut.teacher_ids) == cut.chunks[-1, 1] < len(whole.teacher_ids)
    assert np.array_equal(cut.teacher_ids, whole.teacher_ids[: len(cut.teacher_ids)])
    assert np.array_equal(cut.chunks, whole.chunks[: len(cut.chunks)])
    # Of a whole answer the teacher reads its end of turn.
    end = TEACHER.special_id("x", "<|eot_id|>")
    assert end in whole.teacher_ids[whole.chunks[-1, 1] :]


def test_a_prompt_over_the_teachers_length_keeps_its_cross_entropy() -> None:
    preparer = cross(lengths=LengthConfig(student=512, teacher=32, block=32))
    far, near = preparer.usable([chat("x = 1", request="word " * 40), chat("y = 2")])
    assert far.teacher_ids is not None and preparer.counts["beyond_teacher"] == 1
    assert len(far.chunks) == len(far.teacher_ids) == 0 < len(far.maskable)
    assert len(near.chunks) > 0


def test_a_full_last_block_without_eos_gets_a_block_that_ends_the_text() -> None:
    """The template's end of turn is not EOS: without it nothing would teach the student to stop."""
    eos = TEACHER.special_id("eos")

    def row(n: int, end_block: bool, student: int = 128) -> Prepared:
        lengths = LengthConfig(student=student, teacher=128, block=32, end_block=end_block)
        examples = [chat(" ".join(["one"] * n), "Count")]
        return Preparer(TEACHER, None, lengths, TEACHER.special_id("mask")).usable(examples)[0]

    full = next(n for n in range(1, 80) if eos not in row(n, False).student_ids)
    plain, ended = row(full, False), row(full, True)
    assert len(ended.student_ids) == len(plain.student_ids) + 32
    assert (ended.student_ids[-32:] == eos).all() and ended.spans[-1, 1] == len(ended.student_ids)
    no_room = row(full, True, student=len(plain.student_ids))
    assert len(no_room.student_ids) == len(plain.student_ids)
    # Where some EOS is there already, none is added.
    assert len(row(full - 1, True).student_ids) == len(row(full - 1, False).student_ids)


def align(
    teacher: Sequence[int], student: Sequence[int], length: int, starts: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Chunks of tokens of these lengths, within `length` bytes."""
    ours, theirs = (token_boundaries(np.array(side, np.int64)) for side in (teacher, student))
    return align_bytes(ours, theirs, length, *starts)


def test_reproduces_the_golden_chunks(golden: Path) -> None:
    document = json.loads((golden / "alignment.json").read_text())
    assert document["cases"]
    for case in document["cases"]:
        names = ("teacher_tokens", "student_tokens")
        teacher, student = ([len(byte_level_bytes(t) or b"") for t in case[n]] for n in names)
        assert align(teacher, student, sum(teacher)).tolist() == case["chunks"]


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Token lengths that add up to `total`."""
    points = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set[int]())
    return points.map(lambda at: np.diff([0, *sorted(at), total]).tolist())


two_sides = st.integers(1, 60).flatmap(lambda n: st.tuples(cuts(n), cuts(n)))
few = st.lists(st.integers(1, 9), max_size=4)
Sides = tuple[list[int], list[int]]


@given(two_sides)
def test_chunks_partition_the_text_in_order_and_are_minimal(sides: Sides) -> None:
    teacher, student = sides
    chunks = align(teacher, student, sum(teacher))
    t_edges, s_edges = (np.cumsum([0, *side]) for side in sides)
    assert chunks[0, 0] == chunks[0, 2] == 0
    assert (chunks[-1, 1], chunks[-1, 3]) == (len(teacher), len(student))
    assert (chunks[1:, [0, 2]] == chunks[:-1, [1, 3]]).all()
    for t0, t1, s0, s1 in chunks:
        assert (t_edges[t0], t_edges[t1]) == (s_edges[s0], s_edges[s1])
        assert not set(t_edges[t0 + 1 : t1]) & set(s_edges[s0 + 1 : s1])


@given(two_sides, few, few, st.integers(0, 40))
def test_a_stretch_keeps_to_its_bytes(
    sides: Sides, before_t: list[int], before_s: list[int], length: int
) -> None:
    """Tokens before it, of other lengths on either side, shift indices and nothing else."""
    teacher, student = sides
    length = min(length, sum(teacher))
    plain = align(teacher, student, length)
    starts = sum(before_t), sum(before_s)
    shifted = align(before_t + teacher, before_s + student, length, starts)
    assert (shifted == plain + np.array([len(before_t)] * 2 + [len(before_s)] * 2)).all()
    if len(plain):
        assert np.cumsum(teacher)[plain[-1, 1] - 1] <= length


def test_what_belongs_to_no_chunk() -> None:
    # Teacher: [ab][cd][ef]; student: [a][bcd][e][f]; bytes 1 … 6.
    assert align([2, 2, 2], [1, 3, 1, 1], 5, (1, 1)).tolist() == [[2, 3, 2, 4]]
    assert align([3, 3], [6], 5).shape == align([], [], 0).shape == (0, 4)
    assert align([2, 0, 2], [2, 2], 4).tolist() == [[0, 2, 0, 1], [2, 3, 1, 2]]


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_common_prefix(a: bytes, b: bytes) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
