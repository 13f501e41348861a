"""A student as SGLang and LMDeploy serve it: what transformers 4 and 5 read of its folder; and that
an engine says what `tide sample` says, by a plain reading of SDAR's attention and LowConfidence.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig

from shared.data.reading import iter_examples
from shared.settings.data import DataConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.export import export_student
from student_train.using.settings import SampleConfig
from student_train.using.student import load_for_use, sample
from tests.student_train.using.test_load import edited

ROOT = Path(__file__).parents[2]
OTHER = Path(os.environ.get("TIDE_TRANSFORMERS4", ROOT / ".venv/transformers4/bin/python"))
TEXTS = ["def f(x):\n    return 'é🙂'  #<|mask|>\n\n", "<|im_start|>user\n  1 + 1?<|im_end|>", ""]
EMBEDDED = ROOT / "student_train/tiny_students/cross"


class Served:
    """SDAR as an engine has it from the folder's files alone, without a cache."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        self.config: Any = AutoConfig.from_pretrained(folder)
        self.how = yaml.safe_load((folder / "sglang.yaml").read_text())
        self.ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]

    def logits(self, ids: list[int]) -> Tensor:
        """Each block sees itself and all before it; blocks are counted from position 0."""
        config, width, place = self.config, self.config.head_dim, torch.arange(len(ids))
        hidden = (place // self.how["block_size"])[:, None] < place // self.how["block_size"]
        speed = config.rope_theta ** (-torch.arange(0, width, 2) / width)
        angle = (place[:, None] * speed).repeat(1, 2)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ self.tensors[f"{name}.weight"].T

        x = self.tensors["model.embed_tokens.weight"][ids]
        for number in range(config.num_hidden_layers):
            name = f"model.layers.{number}"
            h, a = self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn"
            q, k, v = (linear(h, f"{a}.{n}_proj").unflatten(1, (-1, width)) for n in "qkv")
            q, k = self.norm(q, f"{a}.q_norm"), self.norm(k, f"{a}.k_norm")
            q, k, v = turned(q.transpose(0, 1)), turned(k.transpose(0, 1)), v.transpose(0, 1)
            k, v = (y.repeat_interleave(len(q) // len(y), dim=0) for y in (k, v))
            scores = (q @ k.mT / width**0.5).masked_fill(hidden, -torch.inf)
            x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{a}.o_proj")
            h, m = self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"
            gated = silu(linear(h, f"{m}.gate_proj")) * linear(h, f"{m}.up_proj")
            x = x + linear(gated, f"{m}.down_proj")
        return linear(self.norm(x, "model.norm"), "lm_head")

    @torch.no_grad()
    def answer(self, prompt: list[int], limit: int) -> list[int]:
        """LowConfidence: all that is surer than the threshold, else the surest; whole blocks."""
        ids, size, new = list(prompt), self.how["block_size"], list[int]()
        while len(new) < limit and not set(self.ends) & set(new):
            masked = torch.arange(len(ids), (len(ids) // size + 1) * size)
            ids += [self.config.mask_token_id] * len(masked)
            while len(masked):
                probability, tokens = self.logits(ids)[masked].softmax(-1).max(-1)
                settled = probability > self.how["threshold"]
                settled[probability.argmax()] = True
                for at, token in zip(masked[settled], tokens[settled], strict=True):
                    ids[int(at)] = int(token)
                masked = masked[~settled]
            new = ids[len(prompt) :]
        end = min([new.index(token) for token in self.ends if token in new], default=len(new))
        return new[: min(end, limit)]


def test_an_engine_says_what_tide_sample_says(tmp_path: Path) -> None:
    """To fifty prompts that the student was not trained on, of every length modulo the block."""
    export_student(EMBEDDED, tmp_path / "served", "sdar")
    engine, student = Served(tmp_path / "served"), load_for_use(str(EMBEDDED), "cpu")
    chats = list(iter_examples(DataConfig("stdlib:heldout", limit=50)))
    prompts = [student.tokenizer.encode_prompt(chat.messages[:-1]) for chat in chats]
    config = SampleConfig(new_tokens=40, threshold=0.95)
    said = sample(student.model, prompts, student.special, config)
    assert said == [engine.answer(prompt, 40) for prompt in prompts]
    assert len({len(prompt) % 32 for prompt in prompts}) > 10
    again = load_for_use(str(tmp_path / "served"), "cpu")  # and tide serves the folder as well
    assert sample(again.model, prompts[:8], again.special, config) == said[:8]


_READ = """
import json, sys
from transformers import AutoConfig, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, read = AutoTokenizer.from_pretrained(folder), {}
read["ids"] = tokenizer(texts, add_special_tokens=False)["input_ids"]
read["named"] = [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
chat = tokenizer.apply_chat_template([{"role": "user", "content": "f"}], tokenize=False)
read["chat"], config = chat, {}
if sys.argv[3] != "a2d":
    config = AutoConfig.from_pretrained(folder)
    names = ["rope_theta", "model_type", "architectures", "block_size", "mask_token_id"]
    names = names if sys.argv[3] == "sdar" else names[:1]
    read |= {name: getattr(config, name) for name in names}
print(json.dumps(read))
"""


@pytest.mark.parametrize("layout", ["hf", "a2d", "sdar"])
def test_transformers_4_reads_what_5_does(student: str, tmp_path: Path, layout: Any) -> None:
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    source = edited(student, tmp_path / "source", rope_parameters=rope)
    export_student(source, tmp_path / "out", layout)
    ours = Tokenizer.load(source)
    wanted = {"ids": ours.encode(TEXTS), "named": [2047, 2046, 2044]}
    wanted["chat"] = ours.backend.apply_chat_template(
        [{"role": "user", "content": "f"}], tokenize=False
    )
    if layout == "hf":
        wanted |= {"rope_theta": 1e6}
    if layout == "sdar":
        wanted |= {"rope_theta": 1e6, "model_type": "sdar", "architectures": ["SDARForCausalLM"]}
        wanted |= {"block_size": 32, "mask_token_id": 2047}
        config: Any = AutoConfig.from_pretrained(tmp_path / "out")
        assert [config.rope_theta, config.rope_parameters] == [1e6, rope]
    again = Tokenizer.load(tmp_path / "out")
    assert (again.encode(TEXTS), again.fingerprint) == (wanted["ids"], ours.fingerprint)
    if not OTHER.exists():
        pytest.skip(f"no Python with transformers 4.57 at {OTHER}: `make test-slow` makes it")
    command = [str(OTHER), "-c", _READ, str(tmp_path / "out"), json.dumps(TEXTS), layout]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(told.stdout.splitlines()[-1]) == wanted


def test_what_engines_could_not_serve(
    student: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = edited(student, tmp_path / "silent", block_size="absent")
    with pytest.raises(TideError, match="block_size"):
        export_student(silent, tmp_path / "out", "sdar")
    export_student(Path(student), tmp_path / "other", "sdar")
    assert "151669" in caplog.text and "2047" in caplog.text  # engines know one mask alone
