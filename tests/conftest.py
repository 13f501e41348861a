"""Shapes and types in signatures are enforced in every test; small caches are made here."""

import atexit
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tide-hf-")  # not the user's own data sets

from jaxtyping import install_import_hook

with install_import_hook(["shared", "teacher_cache", "student_train"], "beartype.beartype"):
    import student_train.training.trainer  # noqa: F401
    import teacher_cache.run.build  # noqa: F401

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM

from shared.data.reading import iter_examples
from shared.models.checkpoint import resolve
from shared.settings.build import build
from shared.settings.config import CacheConfig, DataConfig
from teacher_cache.run.build import build_cache

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
calm = [HealthCheck.function_scoped_fixture]
settings.register_profile("tide", deadline=None, derandomize=True, suppress_health_check=calm)
settings.load_profile("tide")
# How many times the examples of a property test are tried, at random (`make test-more`); 0: the
# same ones always, so that what fails is what was changed.
MORE = int(os.environ.get("TIDE_EXAMPLES", "0"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`TIDE_EXAMPLES`, over what each property test says of itself."""
    functions = {item.obj for item in items if isinstance(item, pytest.Function) and MORE}
    for function in functions:
        test = getattr(function, "__func__", function)
        if own := getattr(test, "_hypothesis_internal_use_settings", None):
            more = settings(own, max_examples=MORE * own.max_examples, derandomize=False)
            test._hypothesis_internal_use_settings = more


GOLDEN = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden"))
TEACHER_TOKENIZER = Path(resolve("embedded:teacher_cache.teachers/tiny"))
STUDENT_TOKENIZER = Path(resolve("embedded:student_train/tiny_tokenizer"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference's numbers: `tests/golden`, or another folder laid out like it."""
    return GOLDEN


@pytest.fixture(scope="session")
def random_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in float32 with the embedded teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("random-teacher")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": 4091, "mask_token_id": 4095,
    }  # fmt: skip
    config = LlamaConfig(**sizes, tie_word_embeddings=False, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TEACHER_TOKENIZER / name, folder / name)
    return folder


@lru_cache
def chats_file() -> Path:
    """Held-out functions of the standard library as JSONL: 24 to cache, 12 more behind them."""
    folder = Path(tempfile.mkdtemp(prefix="tide-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    chats = iter_examples(DataConfig("stdlib:heldout", limit=36))
    rows = [json.dumps({"messages": list(chat.messages)}) + "\n" for chat in chats]
    (folder / "chats.jsonl").write_text("".join(rows))
    (folder / "heldout.jsonl").write_text("".join(rows[24:]))
    return folder / "chats.jsonl"


def heldout_file() -> Path:
    """The functions of `chats_file` that no cache of the tests holds."""
    return chats_file().with_name("heldout.jsonl")


def write_chats(path: Path, responses: list[str]) -> dict[str, str]:
    """Chats with these responses as a JSONL file; the settings of a source that reads it."""
    asked = {"role": "user", "content": "q"}
    chats = [[asked, {"role": "assistant", "content": response}] for response in responses]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {"source": str(path)}


def small_cache_config(teacher: str, model: Path, out: Path, **changes: object) -> CacheConfig:
    """Settings of a cache of 24 standard-library functions in three shards and two draws."""
    values: dict[str, object] = {"teacher": teacher, "model": str(model), "out": out}
    values |= {"shard_examples": 8, "data": {"source": str(chats_file()), "limit": 24}}
    values |= {"lengths": {"student": 128, "teacher": 128, "block": 32}}
    values |= {"targets": {"k": 8, "rank": 6, "pilot": 200}}
    values |= {"engine": {"dtype": "float32", "device": "cpu"}}
    return build(CacheConfig, values | changes)


def files(cache: Path) -> dict[str, bytes]:
    """Everything that makes a cache."""
    found = [cache / "manifest.json", cache / "ledger.parquet"]
    found += [*cache.glob("shards/draw=*/*"), *cache.glob("*_tokenizer/*"), *cache.glob("tables/*")]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="session")
def caches(random_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished small caches by teacher name. Read only: copy one before changing it."""
    folder = tmp_path_factory.mktemp("caches")
    made = {teacher: folder / teacher for teacher in ("tiny-cross", "tiny-shared")}
    for teacher, out in made.items():
        build_cache(small_cache_config(teacher, random_teacher, out))
    return made


@pytest.fixture(scope="session")
def student(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small student after four steps."""
    from student_train.training.trainer import train_student
    from tests.student_train.training.test_trainer import config

    out = tmp_path_factory.mktemp("student") / "run"
    train_student(config(caches["tiny-cross"], out, max_steps=4))
    return str(out / "model")
