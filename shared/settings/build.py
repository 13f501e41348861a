"""Settings as frozen dataclasses, made from TOML and `section.key=value` texts, and back.

@strict
class KL:
    type: Literal["kl"] = "kl"
    temperature: Positive = 2.0

Distillation = Annotated[NoDistillation | KL, BY_TYPE]  # TOML: { type = "kl", temperature = 2.0 }
"""

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from shared.system.files import TideError

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BY_TYPE = Field(discriminator="type")  # of a union of variants: the class with this `type`

_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
          "path": "a path", "tuple": "a list", "dataclass": "a table", "dict": "a table",
          "model": "a table", "finite": "a finite number", "too": "one or more"}  # fmt: skip
# What Hugging Face's Trainer, TRL and peft call otherwise.
OTHERS = {
    "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "train_batch_size": "global_batch", "gradient_accumulation_steps": "accumulation",
    "lr": "learning_rate", "warmup_steps": "warmup_ratio (a share of the steps)",
    "lr_scheduler_type": "schedule", "optim": "optimizer", "bf16": "precision=bfloat16",
    "fp16": "precision=bfloat16 (or float32)", "torch_compile": "compile=on",
    "use_cpu": "device=cpu", "fsdp": "parallel=fsdp", "output_dir": "out",
    "logging_steps": "log_steps", "save_steps": "checkpoint_steps",
    "dataloader_num_workers": "loader_workers", "eval_dataset": "heldout.source",
    "attn_implementation": "student.attention", "model_name_or_path": "student.checkpoint",
    "use_peft": "student.lora={rank=16,alpha=32}", "lora_r": "student.lora.rank", "r": "rank",
    "lora_alpha": "student.lora.alpha", "target_modules": "targets",
    "lora_target_modules": "student.lora.targets", "dataset_name": "data, of tide cache,",
    "train_dataset": "data, of tide cache,", "max_length": "lengths.student, of tide cache,",
    "max_seq_length": "lengths.student, of tide cache,",
    "teacher_model_name_or_path": "teacher, or model, of tide cache,",
    "chat_template_path": "student_chat_template, of tide cache,",
}  # fmt: skip
_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def strict(cls: type[T]) -> type[T]:
    """A frozen dataclass; a name that it does not have is an error where it is built from TOML."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def require(condition: bool, message: str) -> None:
    """TideError with `message` where settings do not fit each other."""
    if not condition:
        raise TideError(message)


def build(
    kind: type[T],
    values: Mapping[str, Any],
    where: str = "the configuration",
    imports: bool = False,
) -> T:
    """A config of type `kind` from nested dicts. TideError names every setting that is wrong.

    `imports`: the user states these settings here and now, so that an objective of their own may be
    imported (`shared.settings.own`); what a file of a run says is no such word.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values), context=imports or None)
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_explain(dict(item), kind) for item in error.errors()))
        fix = "correct the recipe or the --set option named above"
        raise TideError(f"invalid settings for {where}: {problems}", fix=fix) from error


def _explain(item: dict[str, Any], kind: Any) -> str:
    """One of pydantic's errors in words: the setting's name, its value, what it may be."""
    # 1. walk down to the setting: fields, members of lists, and tags of unions, which no user sees
    kinds, path, hint, names = dataclasses_in(kind), [], kind, []
    for step in item["loc"]:
        hints = {name: hint for k in kinds for name, hint in field_types(k).items()}
        names = sorted(hints)
        if step in hints:
            hint = hints[step]
            kinds = dataclasses_in(hint)
        elif tagged := [k for k in kinds if step in (getattr(k, "type", None), k.__name__)]:
            kinds = tagged
            continue
        elif step in ("int", "float") or " " in str(step):
            continue
        path.append(str(step))
    name = ".".join(path)
    # 2. say what is wrong with it
    error, context = item["type"], item.get("ctx", {})
    match error:
        case "unexpected_keyword_argument":
            return f"there is no setting {name}; {advice(path[-1], names)}"
        case "value_error":
            return f"{name}: {context['error']}" if name else str(context["error"])
        case "missing":
            return f"{name} is missing"
        case "union_tag_invalid":
            return f"{name}.type is {context['tag']!r}, expected one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{name} is {item['input']!r:.80}, expected a table with a type"
    expected = _TYPES.get(error.split("_")[0]) or item["msg"].removeprefix("Input should be ")
    if error == "tuple_type":
        expected = f"a list: {json.dumps([item['input']], default=str):.80}"
    if error.startswith(("greater", "less")) or (error == "finite_number" and limits(hint)):
        expected = limits(hint)
    return f"{name or 'all'} is {item['input']!r:.80}, expected {expected}"


def limits(hint: Any) -> str:
    """The bounds of a setting's type in words, such as `at least 1, at most 100`; or nothing."""
    parts, bounds = [hint], []
    while parts:
        part = parts.pop()
        parts += typing.get_args(part)
        for bound in getattr(part, "metadata", ()):  # of pydantic's Field
            named = [(word, getattr(bound, name, None)) for name, word in _BOUNDS.items()]
            bounds += [f"{word} {value}" for word, value in named if value is not None]
    return ", ".join(bounds)


def field_types(kind: type) -> dict[str, Any]:
    """The settings of a dataclass with their types, annotations included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def dataclasses_in(kind: Any) -> list[type]:
    """The dataclasses that a type may be, through unions, annotations and tuples."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [kind]
    return [one for part in typing.get_args(kind) for one in dataclasses_in(part)]


def advice(name: str, names: Sequence[str]) -> str:
    """Words that point to the nearest of `names`, or to all of them; to ours from another's."""
    if name in OTHERS:
        return f"what Hugging Face calls {name} is {OTHERS[name]} here"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(names)}" if names else "there are none here"


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content; TideError where it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise TideError(what, expected="a TOML recipe") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = f"{path} is not TOML: {error}"
        raise TideError(what, fix="correct the line that it names") from error


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], flags: Mapping[str, Any] | None = None
) -> None:
    """Change nested tables: first by flags (`"noise.draws": 4`; None: not given), then by texts
    `section.key=value`, whose value is TOML or a bare word. A number as key is a member of a list.
    """
    changes = [(key, value) for key, value in (flags or {}).items() if value is not None]
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            expected = "section.key=value, such as noise.draws=4"
            raise TideError(f"{text!r} is no setting", expected=expected)
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            value = raw
        changes.append((key.strip(), value))
    for key, value in changes:
        *above, last = key.split(".")
        place: Any = values
        try:
            for name in above:
                place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
            place[int(last) if isinstance(place, list) else last] = value
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            what = f"there is no place for {key}: what stands above is a value, or a shorter list"
            fix = "name a member as in data.0.limit=1000, or replace the list: --data SOURCE"
            raise TideError(what, fix=fix) from error


def to_plain(config: Any) -> Any:
    """A config as JSON-able dicts, for manifests and logs; `type` fields name the variants."""
    return to_jsonable_python(config)


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Lines `place: old → new` for every leaf of two nested dicts that differs. What is null in one
    may be absent in the other: a setting that did not exist yet.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            inner = f"{place}.{key}" if place else str(key)
            lines += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
        return lines
    same = old == new or {str(old), str(new)} == {"absent", "None"}
    return [] if same else [f"{place}: {json.dumps(old)} → {json.dumps(new)}"]
