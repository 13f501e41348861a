"""Checkpoints are loaded whole or not at all: every tensor used once, every parameter filled,
nothing pickled.
"""

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


def load(folder: Path, architecture: str = "llama", **more: Any) -> Any:
    return load_model(open_checkpoint(str(folder)), architecture, torch.float32, **more)


def refused(folder: Path, architecture: str = "llama") -> str:
    """What both the loader and the account from the headers alone say."""
    with pytest.raises(TideError) as error:
        check_weights(open_checkpoint(str(folder)), architecture)
    with pytest.raises(TideError):
        load(folder, architecture)
    return str(error.value)


def test_the_weights_arrive_as_they_are(random_teacher: Path) -> None:
    model, stored = load(random_teacher), load_file(random_teacher / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert not model.training and not any(p.requires_grad for p in loaded.values())


def test_shards_are_read_through_their_index_and_a_missing_one_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    expected = load(copy).state_dict()
    names = sorted(tensors)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, copy / file, {"format": "pt"})
    index = {"weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    assert all(torch.equal(v, expected[k]) for k, v in load(copy).state_dict().items())
    (copy / "a-2.safetensors").unlink()
    assert "a-2.safetensors" in refused(copy)


def test_truncated_and_pickled_files_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert path.name in refused(copy)
    path.write_bytes(content)
    path.rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(copy)


def test_left_over_missing_and_misshapen_tensors_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, path, {"format": "pt"})
    assert "extra.weight" in refused(copy)
    less = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    save_file(less, path, {"format": "pt"})
    assert "model.norm.weight" in refused(copy)
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, path, {"format": "pt"})
    assert "(31,)" in refused(copy)
    edit_config(copy, model_type="gpt2")
    assert "gpt2" in refused(copy)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_one_expert_of_a_stack_is_missed(golden: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(golden / "llada_moe", tmp_path / "m", copy_function=shutil.copy))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = max(key for key in tensors if "experts" in key and "down_proj" in key)
    tensor = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = tensor[:-1].contiguous()
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    assert refused(folder, "llada_moe")


def test_tied_weights_that_disagree_are_refused(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "a2d_qwen3", tmp_path / "m", copy_function=shutil.copy))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    model = load(folder, "qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    path.unlink()
    moved = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}
    save_file(moved, path, {"format": "pt"})
    with pytest.raises(TideError):
        load(folder, "qwen3")


def test_what_lies_beside_the_weights_plays_no_part(copy: Path) -> None:
    """Adapters, generation settings and code of strangers."""
    expected = load(copy).state_dict()
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    (copy / "generation_config.json").write_text("{")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text("raise SystemExit")
    assert all(torch.equal(v, expected[k]) for k, v in load(copy).state_dict().items())


def test_a_teacher_saved_again_is_loaded_again(golden: Path, tmp_path: Path) -> None:
    """The renames of one layout are not those of another class: a new Llama has a Llama's names."""
    load(golden / "llada", "llada")
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert load(tmp_path).config.hidden_size == 8


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), str(tmp_path), "nobody/nothing"):
        with pytest.raises(TideError):
            open_checkpoint(place)


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
    with pytest.raises(TideError) as error:
        find_teacher("llada-8")
    assert "llada-8b" in str(error.value)
    for text, name in ((f"[mine]\n{fields}maskid = 3\n", "maskid"), ("mine = 3\n", "mine")):
        file.write_text(text)
        with pytest.raises(TideError) as error:
            find_teacher("mine", file)
        assert name in str(error.value)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_quantised_linear_layers(tmp_path: Path, kind: Any, limit: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    exact, packed = load(tmp_path), load(tmp_path, quantization=kind)
    assert {p.dtype for n, p in packed.named_parameters() if "proj" in n} == {
        torch.int8 if kind == "int8" else torch.uint8
    }
    assert torch.equal(packed.lm_head.weight, exact.lm_head.weight)  # the head keeps its precision
    ids = torch.randint(0, 4000, (2, 16))
    with torch.inference_mode():
        a, b = exact(input_ids=ids).logits, packed(input_ids=ids).logits
    assert 0 < ((a - b).norm() / a.norm()).item() < limit


def test_what_cannot_be_quantised_is_refused(golden: Path) -> None:
    with pytest.raises(TideError):  # stacked experts are no linear layers
        load(golden / "llada_moe", "llada_moe", quantization="int4")


def test_a_device_map_changes_no_value(random_teacher: Path) -> None:
    exact = load(random_teacher)
    ids = torch.randint(0, 4000, (2, 16))
    for kind in ("auto", "balanced", "sequential"):
        with torch.inference_mode():
            mapped = load(random_teacher, device_map=kind)
            assert torch.equal(exact(input_ids=ids).logits, mapped(input_ids=ids).logits)


def test_a_machine_that_is_too_small(random_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import accelerate

    for place in (accelerate, accelerate_utils):
        monkeypatch.setattr(place, "get_max_memory", lambda *_: {"cpu": 100_000})
    with pytest.raises(TideError):
        load(random_teacher, device_map="sequential")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory accounts")
def test_loading_takes_the_memory_of_one_copy_in_the_target_dtype(tmp_path: Path) -> None:
    """Resident memory at its peak, in a process of its own; the files, which are mapped, count as
    well.
    """
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    index, names = {}, sorted(shapes)
    for i in range(0, len(names), 10):
        file = f"model-{i:03d}.safetensors"
        part = {n: torch.ones(shapes[n], dtype=torch.bfloat16) for n in names[i : i + 10]}
        save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.save_pretrained(tmp_path)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(tmp_path / "small")
    script = f"""
import re, torch
from pathlib import Path
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model

def high_water():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_model(open_checkpoint({str(tmp_path / "small")!r}), "llama", torch.float32)
before = high_water()
load_model(open_checkpoint({str(tmp_path)!r}), "llama", torch.float32)
print(high_water() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    model = sum(4 * shape.numel() for shape in shapes.values())
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert 0.95 * model < int(done.stdout) < 1.1 * (model + files)  # two copies would be 2 * model


SCALINGS: dict[str, Any] = {
    "none": None,
    "linear, old name": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_rope_is_what_transformers_makes_of_the_same_folder(
    architecture: str, tmp_path: Path
) -> None:
    """Of configs that transformers 4 wrote."""
    stock: dict[str, Any] = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    config_class, model_class = stock[architecture]
    torch.manual_seed(0)
    model_class(config_class(**SIZES)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("rope_parameters")
    for scaling in SCALINGS.values():
        changed = {**values, "rope_theta": 5000.0, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        expected = model_class.from_pretrained(tmp_path).eval()
        ids = torch.arange(40)[None]
        with torch.no_grad():
            ours, theirs = load(tmp_path, architecture)(ids).logits, expected(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
