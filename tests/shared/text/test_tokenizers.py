from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizer as PythonBackend
from transformers import PreTrainedTokenizerFast

from shared.aligned.examples import Preparer
from shared.settings.config import LengthConfig
from shared.system.errors import TideError
from shared.text.byte_level import byte_level_alphabet
from shared.text.templates import ChatTemplate
from shared.text.tokenizers import Tokenizer
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER
from tests.shared.aligned.test_examples import chat, check_chunks

CHATS = [
    [("user", "q"), ("assistant", "a")],
    [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "q")],
    [("user", ""), ("assistant", "")],
]


def test_the_alphabet_is_a_bijection() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))
    assert byte_level_alphabet()["\u0120"] == ord(" ")


TOKENIZERS = [Tokenizer.load(TEACHER_TOKENIZER), Tokenizer.load(STUDENT_TOKENIZER)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["teacher", "student"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode([text])[0]) == text.encode()


def test_sentencepiece_style_bytes() -> None:
    vocabulary = {"\u2581hello": 0, "<0xE4>": 1, "<0x0A>": 2, "w": 3, "\u2581": 4, "好": 5}
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[attr-defined]
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw), "spm")
    assert tokenizer.token_bytes == [b" hello", b"\xe4", b"\n", b"w", b" ", "好".encode()]


def test_the_fingerprint_tells_tokenizers_apart_and_survives_use() -> None:
    teacher, student = Tokenizer.load(TEACHER_TOKENIZER), Tokenizer.load(STUDENT_TOKENIZER)
    first = teacher.fingerprint
    fresh = Tokenizer.load(TEACHER_TOKENIZER)
    fresh.backend(["some", "texts of other length"], padding=True, truncation=True, max_length=3)
    assert fresh.fingerprint == first
    assert student.fingerprint != first


@pytest.mark.parametrize(
    "folder", [TEACHER_TOKENIZER, STUDENT_TOKENIZER], ids=["headers", "chatml"]
)
@pytest.mark.parametrize("messages", CHATS, ids=["two", "five", "empty"])
def test_contents_are_located(folder: Path, messages: list[tuple[str, str]]) -> None:
    tokenizer = Tokenizer.load(folder)
    chat = [{"role": r, "content": c} for r, c in messages]
    rendered = tokenizer.render(chat)
    assert rendered.text == tokenizer.backend.apply_chat_template(chat, tokenize=False)
    assert [rendered.text[slice(*span)] for span in rendered.plain or ()] == [
        c for _, c in messages
    ]
    prompt = tokenizer.backend.apply_chat_template(
        chat[:-1], tokenize=False, add_generation_prompt=True
    )
    assert rendered.text[: rendered.response_start] == prompt


LAYOUTS = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama-3 headers": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "role tags": "{% for m in messages %}<role>{{ {'user': 'HUMAN', 'system': 'SYSTEM'}.get(m.role, 'ASSISTANT') }}"
    "</role>{{ m.content }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("messages", CHATS, ids=["two", "five", "empty"])
def test_the_layouts_of_real_teachers(layout: str, messages: list[tuple[str, str]]) -> None:
    tokenizer = Tokenizer.load(TEACHER_TOKENIZER)
    tokenizer.backend.chat_template = LAYOUTS[layout]
    chat = [{"role": r, "content": c} for r, c in messages]
    rendered = tokenizer.render(chat)
    assert rendered.text.startswith(
        tokenizer.backend.apply_chat_template(chat, tokenize=False).rstrip("\n")
    )
    assert [rendered.text[slice(*span)] for span in rendered.plain or ()] == [
        c for _, c in messages
    ]
    prompt = tokenizer.backend.apply_chat_template(
        chat[:-1], tokenize=False, add_generation_prompt=True
    )
    assert rendered.text[: rendered.response_start] == prompt


class SlowTokenizer(PythonBackend):
    """A tokenizer in Python, without offsets: SentencePiece words, and bytes for what is no word."""

    def __init__(self, **kwargs: Any) -> None:
        words = ["\u2581", "\u2581the", "\u2581quick", "fox", "e", "x", "\u2581=", "\u2581f"]
        self._ids = {t: i for i, t in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
        super().__init__(eos_token="</s>", pad_token="</s>", mask_token="<mask>", **kwargs)
        self.chat_template = LAYOUTS["chatml"]

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text, tokens = text.replace(" ", "\u2581"), []
        while text:
            found = max(
                (w for w in self._ids if w[0] != "<" and text.startswith(w)), key=len, default=None
            )
            head = found or text[0]
            tokens += [found] if found else [f"<0x{b:02X}>" for b in head.encode()]
            text = text[len(head) :]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {i: t for t, i in self._ids.items()}[index]


@given(
    text=st.text(
        st.sampled_from("the quickfox=é好\n")
        | st.characters(exclude_categories=["Cs", "Z"], codec="utf-8")
    )
)
def test_a_slow_tokenizer_without_offsets_aligns(text: str) -> None:
    assert not SlowTokenizer().is_fast
    slow, student = Tokenizer(SlowTokenizer(), "slow"), TOKENIZERS[1]
    if "\u2581" in text or not text:
        return
    preparer = Preparer(student, slow, LengthConfig(512, 2048), 2047, slow.special_id("mask"))
    (p,) = preparer.usable([chat(text)])
    assert check_chunks(p, text, student, slow) == text.encode()
    assert preparer.counts["unaligned_bytes"] == 0


class Stub:
    """A tokenizer's template interface over a Python function."""

    chat_template = "stub"
    all_special_tokens = ("<|eot_id|>", "<|start|>")

    def __init__(self, render: Any) -> None:
        self._render = render

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        assert not tokenize
        return self._render(messages, add_generation_prompt)


def headers(messages: Any) -> str:
    return "".join(f"<|start|>{m['role']}\n\n{m['content']}<|eot_id|>" for m in messages)


def test_a_header_that_a_template_always_appends_is_cut() -> None:
    template = ChatTemplate(
        Stub(lambda messages, _: headers(messages) + "<|start|>assistant\n\n"), "llada"
    )
    rendered = template.render(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    )
    assert rendered.text == "<|start|>user\n\nq<|eot_id|><|start|>assistant\n\na<|eot_id|>"
    assert rendered.text[rendered.response_start :] == "a<|eot_id|>"


def test_a_template_that_strips_contents() -> None:
    def strips(messages: Any, generation: bool) -> str:
        text = headers([{**m, "content": m["content"].strip()} for m in messages])
        return text + ("<|start|>assistant\n\n" if generation else "")

    rendered = ChatTemplate(Stub(strips), "strips").render(
        [{"role": "user", "content": " q "}, {"role": "assistant", "content": "\n a \n"}]
    )
    assert rendered.text[rendered.response_start :] == "a<|eot_id|>"


def test_a_template_that_drops_thinking_of_earlier_turns() -> None:
    """Qwen3's template cuts earlier answers at </think>: the response must still be found."""

    def drops(messages: Any, generation: bool) -> str:
        last = len(messages) - 1
        cut = [{**m, "content": m["content"].split("</think>")[-1] if i < last else m["content"]}
               for i, m in enumerate(messages)]  # fmt: skip
        return headers(cut) + ("<|start|>assistant\n\n" if generation else "")

    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>x</think>a"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "b"},
    ]
    rendered = ChatTemplate(Stub(drops), "qwen").render(chat)
    assert rendered.text[rendered.response_start :].startswith("b")


def test_bad_templates_are_explained(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(TideError, match="drops message 0"):
        ChatTemplate(Stub(lambda messages, _: messages[-1]["content"]), "x").render(chat)

    def refuses(messages: Any, generation: bool) -> str:
        raise RuntimeError("roles must alternate")

    with pytest.raises(TideError, match="roles must alternate"):
        ChatTemplate(Stub(refuses), "x").render(chat)
    with pytest.raises(TideError, match="no tokenizer could be loaded"):
        Tokenizer.load(tmp_path)


def test_special_ids() -> None:
    student = Tokenizer.load(STUDENT_TOKENIZER)
    assert student.special_id("mask") == student.special_id("mask", "<|mask|>") == 2047
    with pytest.raises(TideError, match=r"has no token '<\|nope\|>'"):
        student.special_id("mask", "<|nope|>")
    with pytest.raises(TideError, match="names no cls token"):
        student.special_id("cls")
