"""Checkpoints are loaded whole or not at all: every tensor used once, nothing pickled."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import utils as accelerate_utils
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import check_weights, load_model
from shared.system.errors import TideError
from teacher_cache.teachers.registry import all_teachers, find_teacher


@pytest.fixture
def copy(random_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_teacher, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def new_llama(width: int, layers: int = 1, vocabulary: int = 4096) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip


def load(folder: Path, architecture: str = "llama", **more: Any) -> Any:
    return load_model(open_checkpoint(str(folder)), architecture, torch.float32, **more)


def refused(folder: Path, architecture: str = "llama") -> str:
    """What both the loader and the account from the headers alone say."""
    with pytest.raises(TideError) as error:
        check_weights(open_checkpoint(str(folder)), architecture)
    with pytest.raises(TideError):
        load(folder, architecture)
    return str(error.value)


def test_the_weights_arrive_as_they_are_and_nothing_beside_them_plays_a_part(copy: Path) -> None:
    """Adapters, generation settings and code of strangers lie there."""
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    (copy / "generation_config.json").write_text("{")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text("raise SystemExit")
    model, stored = load(copy), load_file(copy / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert not model.training and not any(p.requires_grad for p in loaded.values())


def test_shards_are_read_through_their_index_and_a_missing_one_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, copy / file, {"format": "pt"})
    index = {"weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    assert all(torch.equal(v, tensors[k]) for k, v in load(copy).state_dict().items())
    (copy / "a-2.safetensors").unlink()
    assert "a-2.safetensors" in refused(copy)


def test_what_does_not_fit_is_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    less = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    for named, changed in (
        ("extra.weight", {**tensors, "extra.weight": torch.zeros(1)}),
        ("model.norm.weight", less),
        ("(31,)", {**tensors, "model.norm.weight": torch.zeros(31)}),
    ):
        save_file(changed, path, {"format": "pt"})
        assert named in refused(copy)
    path.write_bytes(content[:-100])
    assert path.name in refused(copy)
    path.rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(copy)
    edit_config(copy, model_type="gpt2")
    assert "gpt2" in refused(copy)


def weights_of(checkpoint: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a golden checkpoint without its weights: where they belong, and they."""
    shutil.copytree(checkpoint, folder, copy_function=shutil.copy)
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    return path, tensors


def test_one_expert_of_a_stack_is_missed(golden: Path, tmp_path: Path) -> None:
    path, tensors = weights_of(golden / "llada_moe", tmp_path / "m")
    name = max(key for key in tensors if "experts" in key and "down_proj" in key)
    tensor = tensors.pop(name)
    for change in ({}, {name: tensor[:-1].contiguous()}):
        save_file({**tensors, **change}, path, {"format": "pt"})
        assert refused(path.parent, "llada_moe")


def test_tied_weights_that_disagree_are_refused(golden: Path, tmp_path: Path) -> None:
    model = load(golden / "a2d_qwen3", "qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    path, tensors = weights_of(golden / "a2d_qwen3", tmp_path / "m")
    tensors["lm_head.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TideError):
        load(path.parent, "qwen3")


def test_a_teacher_saved_again_is_loaded_again(golden: Path, tmp_path: Path) -> None:
    """The renames of one layout are not those of another class: a new Llama has a Llama's names."""
    load(golden / "llada", "llada")
    LlamaForCausalLM(new_llama(8, vocabulary=8)).save_pretrained(tmp_path)
    assert load(tmp_path).config.hidden_size == 8


def test_the_fingerprint_follows_config_and_weights(copy: Path) -> None:
    first = open_checkpoint(str(copy)).fingerprint()
    edit_config(copy, rms_norm_eps=1e-3)
    second = open_checkpoint(str(copy)).fingerprint()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert len({first, second, open_checkpoint(str(copy)).fingerprint()}) == 3


def test_the_registry_takes_a_users_teacher_and_explains_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    fields = 'model = "/m"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = false\nlength = 9\nstudent = "/s"\n'  # noqa: E501
    file.write_text(f'[mine]\n{fields}attention = {{ type = "block_causal", block = 4 }}\n')
    assert find_teacher("mine", file).mask_id == 5
    assert "llada-8b" in all_teachers(file)
    with pytest.raises(TideError, match="llada-8b"):
        find_teacher("llada-8")
    for text, name in ((f"[mine]\n{fields}maskid = 3\n", "maskid"), ("mine = 3\n", "mine")):
        file.write_text(text)
        with pytest.raises(TideError, match=name):
            find_teacher("mine", file)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_quantised_linear_layers(golden: Path, tmp_path: Path, kind: Any, limit: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    LlamaForCausalLM(new_llama(64, 2)).save_pretrained(tmp_path)
    exact, packed = load(tmp_path), load(tmp_path, quantization=kind)
    types = {p.dtype for n, p in packed.named_parameters() if "proj" in n}
    assert types == {torch.int8 if kind == "int8" else torch.uint8}
    assert torch.equal(packed.lm_head.weight, exact.lm_head.weight)  # the head keeps its precision
    ids = torch.randint(0, 4000, (2, 16))
    with torch.inference_mode():
        a, b = exact(input_ids=ids).logits, packed(input_ids=ids).logits
    assert 0 < ((a - b).norm() / a.norm()).item() < limit
    with pytest.raises(TideError):  # stacked experts are no linear layers
        load(golden / "llada_moe", "llada_moe", quantization=kind)


def test_a_device_map_changes_no_value_and_says_where_memory_is_short(
    random_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load(random_teacher)
    ids = torch.randint(0, 4000, (2, 16))
    for kind in ("auto", "balanced", "sequential"):
        with torch.inference_mode():
            mapped = load(random_teacher, device_map=kind)
            assert torch.equal(exact(input_ids=ids).logits, mapped(input_ids=ids).logits)
    from transformers.integrations import accelerate

    for place in (accelerate, accelerate_utils):
        monkeypatch.setattr(place, "get_max_memory", lambda *_: {"cpu": 100_000})
    with pytest.raises(TideError):
        load(random_teacher, device_map="sequential")


PEAK = """
import re, sys, torch
from pathlib import Path
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model

peaks = []
for folder in sys.argv[1:]:
    load_model(open_checkpoint(folder), "llama", torch.float32)
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
print(1024 * (peaks[1] - peaks[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory accounts")
def test_loading_takes_the_memory_of_one_copy_in_the_target_dtype(tmp_path: Path) -> None:
    """Resident memory at its peak, in a process of its own; the mapped files count as well."""
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    LlamaForCausalLM(new_llama(8)).save_pretrained(small)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(new_llama(1024, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(large, max_shard_size="30MB")
    command = [sys.executable, "-c", PEAK, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = 4 * sum(p.numel() for p in model.parameters())
    files = sum(file.stat().st_size for file in Path(large).glob("*.safetensors"))
    assert 0.95 * size < int(done.stdout) < 1.1 * (size + files)  # two copies would be 2 * size


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_rope_is_what_transformers_makes_of_the_same_folder(
    architecture: str, tmp_path: Path
) -> None:
    """Of configs that transformers 4 wrote; `type` is the old name of the key."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    qwen, llama = (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)
    config_class, model_class = qwen if architecture == "qwen3" else llama
    torch.manual_seed(0)
    config: Any = config_class(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        max_position_embeddings=256,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=5000.0)
    for scaling in (None, {"type": "linear", "factor": 4.0}, yarn):
        edit_config(tmp_path, rope_scaling=scaling)
        expected: Any = model_class.from_pretrained(tmp_path).eval()
        ids = torch.arange(40)[None]
        with torch.no_grad():
            ours, theirs = load(tmp_path, architecture)(ids).logits, expected(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
