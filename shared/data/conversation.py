"""A row of data as a conversation: its form is recognised (docs/data.md), its messages read."""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from shared.data.messages import REASONING, Message, normal_messages, objects
from shared.data.sources import LONGEST_LINE, Raw, unique_names
from shared.data.tokenised import Tokens, tokens_of
from shared.settings.config import DataConfig
from shared.system.files import Unusable

Row = dict[str, Any]

UNTRAINED = "marked as not to be trained"
MOST_CHARACTERS = 2**20  # of a row: more is no chat to learn from, and slow to tokenise
_ANSWERS = ("answer", "response", "output", "completion")
_FORMS = (  # what a row of each has, and one of which it has beside
    ("messages", "messages", ()),
    ("sharegpt", "conversations", ()),
    ("instruction", "instruction", ("output", "response", "instances")),
    ("prompt_completion", "prompt", ("completion",)),
    ("question_answer", "question", _ANSWERS),
    ("tokens", "input_ids", ("teacher_input_ids", "labels")),
)
# By which data say of an answer, or of a row, whether it is trained.
_MARKS = ("weight", "loss_mask", "loss_weight", "loss_scale", "loss", "train", "training",
          "trainable", "train_on_turn", "learn")  # fmt: skip
_READ = {*REASONING, "role", "from", "content", "value", "name", "tool_calls", "tool_call_id",
         "function_call"}  # fmt: skip
_OF_ROWS = {name for _, one, others in _FORMS for name in (one, *others)}
_OF_ROWS |= {"id", "input", "history", "system", "align_student", "align_teacher", "ranges"}
_OFF, _ON = ("0", "0.0", "false", "no", "off"), ("1", "1.0", "true", "yes", "on")


@dataclass(frozen=True)
class ChatExample:
    """A conversation that ends with an answer.

    `id` is its identity: all that is random about it follows from it. It comes from the content
    (and, for a repeat, from the occurrence), never from `label`, which is the row's own id.
    """

    id: str
    messages: tuple[Message, ...]
    tools: Any = None
    label: str = ""
    tokens: tuple[Tokens, Tokens] | None = None
    """The student's and the teacher's, of a row that has these in the place of messages."""
    unread: tuple[str, ...] = ()
    """What it says beside and nothing here listens to."""


def content_key(messages: Iterable[Message], tools: Any = None) -> str:
    """24 hexadecimal digits: the same conversation has the same key wherever it stands."""
    content = list(messages) if tools is None else [list(messages), tools]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def identity(key: str, occurrence: int) -> str:
    """The id of the n-th row with the content `key` (from 0)."""
    return key if occurrence == 0 else f"{key}#{occurrence}"


def content_of(example_id: str) -> str:
    """The content's key in an id."""
    return example_id.partition("#")[0]


def conversation(raw: Raw, config: DataConfig) -> tuple[ChatExample, str] | None:
    """The conversation in a row, and its form. Unusable where there is none.

    None where a filter leaves the row out, or its content is of the other split.
    """
    row = decode(raw)
    rules = config.filter if isinstance(config.filter, tuple) else (config.filter,)
    for rule in rules if isinstance(row, dict) else ():
        value: Any = row
        for name in rule.field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if rule.contains is None:
            passes = value == rule.equals
        else:
            passes = isinstance(value, str | list | tuple) and rule.contains in value
        if not passes:
            return None
    try:
        example, form = parse(row, config)
    except RecursionError as error:
        raise Unusable("not in its form", "it is nested too deeply") from error
    return (example, form) if in_split(example.id, config) else None


def decode(raw: Raw) -> Any:
    """The row in a line of JSON. Unusable where it is none."""
    if not isinstance(raw, bytes):
        return raw
    if len(raw) > LONGEST_LINE:
        raise Unusable("too large", f"the line has more than {LONGEST_LINE:,} bytes")
    try:
        return json.loads(raw.decode("utf-8", "surrogateescape"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:  # also nested too deeply, or integers too long
        raise Unusable("not JSON", f"not JSON: {str(error)[:120]}") from error


def in_split(key: str, config: DataConfig) -> bool:
    """Whether the content belongs to `config.split`. Equal contents always fall on one side."""
    if config.split == "all":
        return True
    return (_chance(key, "heldout") < config.heldout_share) == (config.split == "heldout")


def copies(key: str, config: DataConfig) -> int:
    """How often a row appears by the source's weight: 0.5 keeps half of the contents, 2.5 gives
    two or three of each.
    """
    whole = int(config.weight)
    return whole + (_chance(key, "weight") < config.weight - whole)


def _chance(key: str, purpose: str) -> float:
    """A number in [0, 1) from a content's key, independent between purposes."""
    digest = hashlib.blake2b(f"{purpose}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def parse(row: Any, config: DataConfig) -> tuple[ChatExample, str]:
    """The conversation in a row and its form. Unusable where there is none."""
    # 1. The form, the row's own name, and the messages as it has them.
    if not isinstance(row, dict):
        raise Unusable("no known form", f"the row is a {type(row).__name__}, not an object")
    form, name = _detect(row, config), row.get("id")

    rejected = str(row.get("label")).lower() == "false"  # KTO's, to learn against
    if rejected or any(str(row.get(mark)).lower() in _OFF for mark in _MARKS):
        raise Unusable(UNTRAINED, "the row says of itself that it is not to be trained")
    label = str(name)[:80] if isinstance(name, str | int) and not isinstance(name, bool) else ""
    label = label.encode(errors="replace").decode()
    unread = _unread(row, {*vars(config).values(), *_OF_ROWS}, "rows")
    if form == "tokens":
        tokens = tokens_of(row)
        key = content_key([{"ids": side.ids} for side in tokens])
        return ChatExample(key, (), None, label, tokens, tuple(sorted(unread))), form
    written = _written_messages(row, form, config)
    messages = normal_messages(written)
    # 2. What the row says of its own training, and what stands there beside. What follows the last
    #    answer that is trained is cut off: a user's words there are answered by nobody.
    for one, message in zip(written, messages, strict=True):
        off = any(str(one.get(name)).lower() in _OFF for name in _MARKS)
        if message["role"] == "assistant" and off:
            message["train"] = False
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        roles = ", ".join(m["role"] for m in messages)
        raise Unusable("no answer", f"no message is from the assistant (roles: {roles})")
    answers = [i for i in answers if "train" not in messages[i]]
    if not answers:
        raise Unusable(UNTRAINED, "every answer of the row is marked as not to be trained")
    messages = messages[: answers[-1] + 1]
    for one in written:
        unread |= _unread(one, _READ, "messages", (*_ON, *_OFF))
    # 3. Tools as templates want them: a list.
    tools = objects(row.get(config.tools_field)) or None
    # 4. The size.
    size = sum(len(m["content"]) for m in messages)
    if size > MOST_CHARACTERS:
        reason = f"the conversation has {size:,} characters, more than {MOST_CHARACTERS:,}"
        raise Unusable("too large", reason)
    try:
        if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise TypeError("no list of objects, nor JSON that is one")
        key = content_key(messages, tools)
    except (TypeError, ValueError) as error:
        raise Unusable("not in its form", f"`{config.tools_field}`: {error}") from error
    return ChatExample(key, tuple(messages), tools, label, unread=tuple(sorted(unread))), form


def _unread(one: Row, known: Collection[Any], of: str, heard: Collection[str] = _ON) -> set[str]:
    """Its fields that say what nothing listens to; a mark may say what is `heard`."""
    said = {n: v for n, v in one.items() if n not in known and v not in (None, "", [], {})}
    marks = {n for n in said if n in _MARKS and str(said[n]).lower() in heard}
    return {f"`{repr(name)[1:-1]:.80}` of {of}" for name in said.keys() - marks}


def _detect(row: Row, config: DataConfig) -> str:
    """The form of a row, by the settings or by the fields that it has."""
    if config.prompt_field is not None:
        return "fields"
    if config.form != "auto":
        return config.form
    if config.messages_field is not None:
        return "messages"
    present = {name for name, value in row.items() if value is not None}
    for form, needed, one_of in _FORMS:
        if needed in present and (not one_of or present & set(one_of)):
            return form
    fields = ", ".join(map(repr, row)) or "(none)"
    raise Unusable(
        "no known form",
        f"no conversation in the fields {fields}: set data.prompt_field and data.response_field, "
        "or data.messages_field",
    )


def _written_messages(row: Row, form: str, config: DataConfig) -> list[Any]:
    """The messages of a row of this form, still as they are written there."""
    system: Any = None
    match form:
        case "messages":
            messages = _messages_in(row, config.messages_field or "messages")
        case "sharegpt":
            system = row.get("system")
            messages = _messages_in(row, config.messages_field or "conversations")
        case "instruction":
            instances = row.get("instances")
            if isinstance(instances, list) and instances and isinstance(instances[0], dict):
                row = {**row, **instances[0]}
            system = row.get("system")
            request = _field(row, "instruction")
            if row.get("input"):
                request = f"{request}\n\n{_field(row, 'input')}"
            messages = []
            history = row.get("history") or []
            for pair in history if isinstance(history, list | tuple) else [history]:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise Unusable("not in its form", "`history` is no list of pairs")
                messages += _pair(pair[0], pair[1])
            answer = next((name for name in ("output", "response") if name in row), "output")
            messages += _pair(request, _field(row, answer))
        case "prompt_completion":
            question, answer = _pair(row.get("prompt"), row.get("completion"))
            front = row["prompt"] if isinstance(row.get("prompt"), list) else [question]
            back = row["completion"] if isinstance(row.get("completion"), list) else [answer]
            messages = [*front, *back]
        case "question_answer":
            answer = next((name for name in _ANSWERS if name in row), "answer")
            messages = _pair(_field(row, "question"), _field(row, answer))
        case _:
            assert config.prompt_field is not None and config.response_field is not None
            system = None if config.system_field is None else row.get(config.system_field)
            messages = _pair(_field(row, config.prompt_field), _field(row, config.response_field))
    return [{"role": "system", "content": system}, *messages] if system else messages


def _messages_in(row: Row, name: str) -> list[Any]:
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        raise Unusable("not in its form", f"`{name}` is not a list with at least one message")
    return messages


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        fields = ", ".join(map(str, row))
        raise Unusable("not in its form", f"the row has no {name!r} (fields: {fields})")
    return row[name]


def _pair(request: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
