"""Conversations as one tokenizer sees them: rendered and tokenised here, or tokenised already."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from shared.aligned.alignment import Side
from shared.data.conversation import ChatExample
from shared.data.tokenised import Tokens
from shared.system.files import Unusable
from shared.text.templates import RenderedChat, Turns
from shared.text.tokenizers import Tokenizer

STUDENT, TEACHER = 0, 1  # places in `ChatExample.tokens`


def sides_of(
    examples: Sequence[ChatExample],
    which: int,
    tokenizer: Tokenizer,
    mask_id: int,
    turns: Turns,
    counts: Counter[str],
) -> list[Side | Unusable]:
    """Each example as `tokenizer` sees it. `which`: of those that are tokenised already, the
    student's tokens or the teacher's. `counts` adds up what templates do not write.
    """
    # 1. What is text, all of it tokenised in one call.
    chats: list[RenderedChat | Unusable] = []
    for example in examples:
        try:
            if example.tokens is None:
                chats.append(tokenizer.template.render(example.messages, turns, example.tools))
        except Unusable as reason:
            chats.append(reason)
    encoded = zip(chats, tokenizer.encode_chats(chats), strict=True)
    # 2. Of each turn its span in tokens, its text in front of the words, and the words.
    sides: list[Side | Unusable] = []
    for example in examples:
        chat, parts = next(encoded) if example.tokens is None else (None, [])
        if isinstance(parts, Unusable):
            side = parts
        elif not isinstance(chat, RenderedChat):
            assert example.tokens is not None
            side = _tokenised(example.tokens[which], tokenizer)
        else:
            ids = np.array([i for part in parts for i in part], np.int32)
            ends = np.cumsum([len(part) for part in parts])  # of prompt, response, prompt, …
            spans = np.array([ends[k : k + 2] for k in range(0, 2 * len(chat.turns), 2)], np.int32)
            text = chat.text
            bodies = tuple((text[t.start : t.body[0]], text[slice(*t.body)]) for t in chat.turns)
            if bodies[-1][1]:
                lost = f"not written by the {('student', 'teacher')[which]}'s template"
                counts.update(f"{lost}: {name}" for name in chat.ignored)
            side = Side(tokenizer, ids, spans, bodies, tuple(t.message for t in chat.turns))
        # 3. What cannot be trained.
        if isinstance(side, Side) and not side.bodies[-1][1]:
            side = Unusable("empty response", "the last answer is empty")
        elif isinstance(side, Side) and (side.ids == mask_id).any():
            name = f"the mask token of {tokenizer.name} ({tokenizer.decode([mask_id])!r})"
            reason = f"the text holds {name}, which a model cannot tell from noise"
            side = Unusable("spells a mask token", reason)
        sides.append(side)
    return sides


def _tokenised(tokens: Tokens, tokenizer: Tokenizer) -> Side | Unusable:
    """The tokens as they are, with what they spell; one answer."""
    known = tokenizer.token_bytes
    if max(tokens.ids) >= len(known):
        reason = f"a token is {max(tokens.ids)}, and {tokenizer.name} has {len(known)} tokens"
        return Unusable("tokens of another tokenizer", reason)
    edges = ((tokens.response, tokens.start), (tokens.start, tokens.end))
    spelled = (b"".join(known[i] for i in tokens.ids[slice(*edge)]) for edge in edges)
    lead, words = (part.decode(errors="ignore") for part in spelled)  # a cut one may end anywhere
    body = words.lstrip()
    span = np.array([[tokens.response, len(tokens.ids)]], np.int32)
    bodies = ((lead + words[: len(words) - len(body)], body),)
    return Side(tokenizer, np.array(tokens.ids, np.int32), span, bodies, (0,))


def refuse_other_words(student: Side, teacher: Side) -> None:
    """Unusable where two sides that came as tokens spell two texts: one of them belongs to another
    tokenizer.
    """
    a, b = (
        unicodedata.normalize("NFC", side.bodies[-1][1].rstrip()) for side in (student, teacher)
    )
    if not (a.startswith(b) or b.startswith(a)):
        reason = f"the answer is {a[:40]!r} to the student and {b[:40]!r} to the teacher"
        raise Unusable("tokens of another tokenizer", reason)
