"""The forms in which people keep conversations, and how each becomes messages.

| form | fields |
|---|---|
| `messages` | `messages` (role, content), `tools` |
| `sharegpt` | `conversations` (from, value), `system`, `tools` |
| `instruction` | `instruction`, `input`, `output`, `system`, `history`; or `instances` |
| `prompt_completion` | `prompt`, `completion`: texts, or lists of messages |
| `question_answer` | `question`, `answer` |
| `fields` | those that `prompt_field`, `response_field` and `system_field` name |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared.data.conversation import ChatExample, Message, content_key
from shared.data.messages import cut_after_last_answer, normal_messages, tools_of
from shared.settings.config import DataConfig
from shared.system.errors import Unusable

Row = dict[str, Any]

MOST_CHARACTERS = 2**20
"""Of one row. More is no chat that a student could learn, and tokenising it takes seconds."""

_ANSWERS = ("answer", "response", "output", "completion")


def _messages(row: Row, config: DataConfig) -> list[Any]:
    return _list(row, config.messages_field or "messages")


def _sharegpt(row: Row, config: DataConfig) -> list[Any]:
    return _with_system(row.get("system"), _list(row, config.messages_field or "conversations"))


def _instruction(row: Row, _: DataConfig) -> list[Any]:
    source = {**row, **row["instances"][0]} if _is_list_of_rows(row.get("instances")) else row
    request = _text(source, "instruction")
    if source.get("input"):
        request = f"{request}\n\n{_text(source, 'input')}"
    past: list[Any] = []
    for pair in source.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unusable("not in its form", "`history` is no list of pairs")
        past += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = _text(source, next((n for n in ("output", "response") if n in source), "output"))
    return _with_system(source.get("system"), [*past, *_pair(request, answer)])


def _prompt_completion(row: Row, _: DataConfig) -> list[Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    front = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    back = (
        completion
        if isinstance(completion, list)
        else [{"role": "assistant", "content": completion}]
    )
    return [*front, *back]


def _question_answer(row: Row, _: DataConfig) -> list[Any]:
    return _pair(
        _text(row, "question"), _text(row, next((n for n in _ANSWERS if n in row), "answer"))
    )


def _fields(row: Row, config: DataConfig) -> list[Any]:
    assert config.prompt_field is not None and config.response_field is not None
    system = None if config.system_field is None else row.get(config.system_field)
    return _with_system(
        system, _pair(_text(row, config.prompt_field), _text(row, config.response_field))
    )


_FORMS: dict[str, Callable[[Row, DataConfig], list[Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "fields": _fields,
}


def detect(row: Row, config: DataConfig) -> str:
    """The form of a row. Unusable with the fields that were found, and what to set, where it has none."""
    if config.prompt_field is not None:
        return "fields"
    if config.form != "auto":
        return config.form
    if config.messages_field is not None:
        return "messages"
    present = {name for name, value in row.items() if value is not None}
    if "messages" in present:
        return "messages"
    if "conversations" in present:
        return "sharegpt"
    if "instruction" in present and present & {"output", "response", "instances"}:
        return "instruction"
    if {"prompt", "completion"} <= present:
        return "prompt_completion"
    if "question" in present and present & set(_ANSWERS):
        return "question_answer"
    raise Unusable(
        "no known form",
        f"no conversation in the fields {', '.join(map(repr, row)) or '(none)'}: set data.prompt_field and "
        "data.response_field, or data.messages_field",
    )


def parse(row: Any, config: DataConfig) -> tuple[ChatExample, str]:
    """The conversation in a row, cut after its last answer, and its form. Unusable where there is none."""
    if not isinstance(row, dict):
        raise Unusable("no known form", f"the row is a {type(row).__name__}, not an object")
    form = detect(row, config)
    messages = cut_after_last_answer(normal_messages(_FORMS[form](row, config)))
    tools = tools_of(row.get(config.tools_field))
    size = sum(len(str(m["content"])) for m in messages)
    if size > MOST_CHARACTERS:
        raise Unusable(
            "too large", f"the conversation has {size:,} characters, more than {MOST_CHARACTERS:,}"
        )
    name = row.get("id")
    label = str(name)[:80] if isinstance(name, str | int) and not isinstance(name, bool) else ""
    return ChatExample(content_key(messages, tools), tuple(messages), tools, label), form


def _list(row: Row, name: str) -> list[Any]:
    found = row.get(name)
    if not isinstance(found, list) or not found:
        raise Unusable("not in its form", f"`{name}` is not a list with at least one message")
    return found


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _text(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise Unusable(
            "not in its form", f"the row has no {name!r} (fields: {', '.join(map(str, row))})"
        )
    return row[name]


def _pair(request: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _with_system(system: Any, messages: list[Any]) -> list[Any]:
    return [{"role": "system", "content": system}, *messages] if system else messages
