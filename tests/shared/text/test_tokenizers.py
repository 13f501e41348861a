"""The bytes of every token, byte-level and SentencePiece; control tokens; tokenizers in parts."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw
from transformers import PreTrainedTokenizer as PythonBackend
from transformers import PreTrainedTokenizerFast

from shared.aligned.examples import Preparer
from shared.settings.config import LengthConfig
from shared.system.files import TideError, Unusable
from shared.text.tokenizers import Tokenizer
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER
from tests.shared.aligned.test_examples import STUDENT, TEACHER, bytes_of, chat, check_chunks
from tests.shared.aligned.test_same_tokens import ANSWERS, CHAT, SHORT
from tests.shared.text.test_templates import PLAIN


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    for tokenizer in (TEACHER, STUDENT):
        ids = tokenizer.encode([text])[0]
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()


def test_the_fingerprint_tells_tokenizers_apart_and_survives_use() -> None:
    fresh = Tokenizer.load(TEACHER.name)
    fresh.backend(["some", "texts of other length"], padding=True, truncation=True, max_length=3)
    assert fresh.fingerprint == TEACHER.fingerprint != STUDENT.fingerprint


class SlowTokenizer(PythonBackend):
    """A tokenizer in Python, without offsets: SentencePiece words, bytes for what is no word."""

    def __init__(self, **kwargs: Any) -> None:
        words = ["▁", "▁the", "▁quick", "fox", "e", "x", "▁=", "▁f"]
        self._ids = {t: i for i, t in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
        super().__init__(eos_token="</s>", pad_token="</s>", mask_token="<mask>", **kwargs)
        self.chat_template = PLAIN

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found = re.findall(r"▁the|▁quick|fox|▁=|▁f|▁|e|x|.", text.replace(" ", "▁"), re.DOTALL)
        spelled = ([f"<0x{b:02X}>" for b in piece.encode()] for piece in found)
        both = zip(found, spelled, strict=True)
        return [t for piece, own in both for t in ([piece] if piece in self._ids else own)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._ids)[index]


others = st.characters(exclude_categories=["Cs", "Z"], codec="utf-8")


@given(text=st.text(st.sampled_from("the quickfox=é好\n") | others))
def test_a_slow_tokenizer_without_offsets_aligns(text: str) -> None:
    slow = Tokenizer(SlowTokenizer(), "slow")
    assert not slow.backend.is_fast
    if "▁" in text or not text:
        return
    preparer = Preparer(STUDENT, slow, LengthConfig(512, 2048), 2047, slow.special_id("mask"))
    (p,) = preparer.usable([chat(text)])
    assert check_chunks(p, text, STUDENT, slow) == text.encode()
    assert preparer.counts["unaligned_bytes"] == 0


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_sentencepiece_student_shares_chunks_with_a_byte_level_teacher(scheme: Any) -> None:
    """Of Llama 2's kind: a space in front of every text, bytes for what is no word."""
    raw: Any = Raw(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(steps)
    special: Any = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    raw.train_from_iterator([*ANSWERS, "first second third"] * 20, trainer)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    student, mask = Tokenizer(fast, scheme), TEACHER.special_id("mask")
    preparer = Preparer(student, TEACHER, SHORT, len(student), mask, "all")
    (p,) = preparer.usable([CHAT])
    assert p.teacher_ids is not None and preparer.counts["unaligned_bytes"] == 0
    spelled = b""
    for t0, t1, s0, s1 in p.chunks.tolist():
        theirs = bytes_of(TEACHER, p.teacher_ids[t0:t1])
        # The space in front of a text has no bytes of its own.
        assert bytes_of(student, p.student_ids[s0:s1]) in (theirs, b" " + theirs)
        spelled += theirs
    assert spelled == "".join(ANSWERS).encode()


def family(name: str) -> Tokenizer:
    """A small tokenizer that writes and reads spaces in the way of a family."""
    raw: Any = Raw(models.BPE(unk_token="<unk>"))
    whole = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.ByteLevel() if "byte" in name else decoders.Sequence(whole)
    if "byte" in name:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=name == "byte, prefix")
    elif name == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        raw.normalizer = normalizers.Sequence(steps)
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name)
    special: Any = ["<unk>", "</s>"]
    alphabet: Any = pre_tokenizers.ByteLevel.alphabet() if "byte" in name else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([" one  two\n three . 's "] * 20, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), name)


@pytest.mark.parametrize("name", ["byte", "byte, prefix", "prepend", "never", "always", "first"])
def test_text_out_is_text_in_at_both_edges(name: str) -> None:
    found = family(name)
    for text in ("one", "one ", "one  ", "\none\n", "two . 's", " one", "  two "):
        if not text.startswith(" ") or name in ("byte", "prepend", "never"):  # others take it away
            ids = found.encode([text])[0]
            assert found.text([*ids, found.special_id("eos"), 10**6]) == text


FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}]


@pytest.mark.parametrize("flags", [*FLAGS, {"single_word": True}, None], ids=str)
def test_a_spelled_token_leaves_those_of_the_template_what_they_are(flags: Any) -> None:
    """Their white space is theirs, or they must be words: as in a chat where nothing is spelled.
    None: what of a text comes first is tokenised otherwise than the rest.
    """
    found = Tokenizer.load(TEACHER.name) if flags is not None else family("first")
    spelled = " <|eot_id|> " if flags is not None else "<|eot_id|>"
    flags = flags or {}
    flags = {"normalized": False, "special": True, **flags}
    found.backend.add_tokens([AddedToken("<|eot_id|>", **flags)], special_tokens=True)
    found.backend.chat_template = PLAIN.replace("<|im_end|>\n", spelled)
    said = [chat(word).messages for word in ("x<|eot_id|>x", "no such")]
    forged, plain = (found.encode_prompt([*m, {"role": "user", "content": "end"}]) for m in said)
    eot = found.special_id("eot", "<|eot_id|>")
    assert forged.count(eot) == plain.count(eot) > 0
    first, last = plain.index(eot) + 2, plain[::-1].index(eot) + 4
    assert forged[:first] == plain[:first] and forged[-last:] == plain[-last:]


@pytest.mark.parametrize("says", ["dropout", "split_special_tokens"])
def test_a_text_has_one_tokenisation_whatever_a_tokenizer_asks_for(
    says: str, tmp_path: Path
) -> None:
    """The ids of one that asks for neither chance nor control tokens as text."""
    folder = Path(shutil.copytree(STUDENT_TOKENIZER, tmp_path / "t"))
    file = folder / ("tokenizer.json" if says == "dropout" else "tokenizer_config.json")
    content = json.loads(file.read_text())
    (content["model"] if says == "dropout" else content)[says] = 0.9 if says == "dropout" else True
    file.write_text(json.dumps(content))
    messages = chat("The quick brown fox. " * 20).messages
    asks, plain = (Tokenizer.load(place) for place in (folder, STUDENT_TOKENIZER))
    assert asks.encode_chats([asks.template.render(messages)]) == plain.encode_chats(
        [plain.template.render(messages)]
    )


def test_a_token_that_a_normaliser_makes_of_a_content_is_seen() -> None:
    found = Tokenizer.load(TEACHER.name)
    raw = found.backend.backend_tokenizer
    raw.normalizer = normalizers.Lowercase()
    found.backend.add_tokens([AddedToken("<|stop|>", special=True, normalized=True)], True)
    found.backend.chat_template = PLAIN
    chats = [found.template.render(chat(words).messages) for words in ("a <|STOP|> b", "a b")]
    odd, plain = found.encode_chats(chats)
    assert isinstance(odd, Unusable) and not isinstance(plain, Unusable)


def test_special_ids(tmp_path: Path) -> None:
    assert STUDENT.special_id("mask") == STUDENT.special_id("mask", "<|mask|>") == 2047
    for role, token in (("mask", "<|nope|>"), ("cls", None)):
        with pytest.raises(TideError) as error:
            STUDENT.special_id(role, token)
        assert (token or role) in error.value.what
    with pytest.raises(TideError):
        Tokenizer.load(tmp_path)


def in_parts(source: Path, target: Path) -> Path:
    """The same tokenizer without tokenizer.json, and with a class that would be remote code."""
    target.mkdir()
    raw = json.loads((source / "tokenizer.json").read_text())
    (target / "vocab.json").write_text(json.dumps(raw["model"]["vocab"], ensure_ascii=False))
    merges = (m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    (target / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((source / "tokenizer_config.json").read_text())
    roles = {k: v for k, v in config.items() if k.endswith("_token")}
    remote = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    settings = {"auto_map": remote, "tokenizer_class": "XTokenizer", **roles}
    settings["additional_special_tokens"] = list(added)
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (target / "tokenization_x.py").write_text("raise SystemExit('remote code was run')\n")
    shutil.copy(source / "chat_template.jinja", target)
    return target


def test_a_tokenizer_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    parts = Tokenizer.load(in_parts(TEACHER_TOKENIZER, tmp_path / "t"))
    texts = [
        "def f(x):\n    return 1  # naïve 😀<|eot_id|> it's 12",
        "\n\n a\t\tb  \r\n",
        "你好 x1;; y",
    ]
    assert parts.encode(texts) == TEACHER.encode(texts)
    assert parts.token_bytes == TEACHER.token_bytes
    for role in ("eos", "pad", "mask"):
        assert parts.special_id(role) == TEACHER.special_id(role)
    assert parts.template.render(chat("a").messages) == TEACHER.template.render(chat("a").messages)


def test_what_a_tokenizer_in_parts_says_of_itself_counts(tmp_path: Path) -> None:
    """A class that transformers knows cuts text in its way; flags stand in several files."""
    folder = in_parts(TEACHER_TOKENIZER, tmp_path / "t")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = json.loads((folder / "added_tokens.json").read_text())
    index, mask = TEACHER.special_id("mask"), TEACHER.backend.mask_token
    flags = {"special": True, "normalized": False}
    stated = {i: {"content": word, "lstrip": word == mask, **flags} for word, i in added.items()}
    settings["added_tokens_decoder"] = stated
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    parts = Tokenizer.load(folder)
    assert parts.encode([f"x  {mask}"])[0] == [*TEACHER.encode(["x"])[0], index]
    del settings["auto_map"]
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = Tokenizer.load(folder)
    assert own.encode(["x  123 y"]) != parts.encode(["x  123 y"])  # Qwen's has a token a digit
    assert own.special_id("mask") == index


def test_parts_that_no_known_pattern_fits_or_that_are_damaged_are_explained(tmp_path: Path) -> None:
    folder = in_parts(TEACHER_TOKENIZER, tmp_path / "t")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    odd = {f"a{i}Ġb{i}": 5000 + i for i in range(600)}
    for text in (json.dumps({**vocabulary, **odd}), "{"):
        (folder / "vocab.json").write_text(text)
        with pytest.raises(TideError):
            Tokenizer.load(folder)
    other = in_parts(STUDENT_TOKENIZER, tmp_path / "s")
    (other / "added_tokens.json").write_text('{"<|x|>": 9000}')
    with pytest.raises(TideError, match="9000"):
        Tokenizer.load(other)
