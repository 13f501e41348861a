from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from shared.models import devices
from shared.models.checkpoint import open_checkpoint
from shared.models.devices import device_of, plan_devices, spread
from shared.models.loading import load_model, meta_model
from shared.system.errors import TideError
from teacher_cache.teachers.registry import all_teachers, find_teacher


@pytest.fixture
def copy(random_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_teacher, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path) -> Any:
    return load_model(open_checkpoint(str(folder)), "llama", torch.float32)


def test_the_weights_arrive_as_they_are(random_teacher: Path) -> None:
    model, stored = load(random_teacher), load_file(random_teacher / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor)
    assert not model.training


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
    with pytest.raises(TideError, match=r"lacks 1 of 2 weight files: a-2.safetensors"):
        load(copy)


def test_a_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TideError, match="no whole safetensors file"):
        load(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(TideError, match=r"only pickled ones[\s\S]*never loaded"):
        load(copy)


def test_a_config_of_another_architecture(copy: Path) -> None:
    edit_config(copy, model_type="gpt2")
    with pytest.raises(TideError, match="model_type 'gpt2'"):
        load(copy)


def test_left_over_missing_and_misshapen_tensors_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(TideError, match=r"1 tensors without a place \['extra.weight'\]"):
        load(copy)
    less = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    save_file(less, path, {"format": "pt"})
    with pytest.raises(TideError, match=r"1 parameters unfilled \['model.norm.weight'\]"):
        load(copy)
    save_file({**tensors, "model.norm.weight": torch.zeros(31)}, path, {"format": "pt"})
    with pytest.raises(TideError, match=r"model.norm.weight has the shape \(31,\)"):
        load(copy)


def test_tied_weights_that_disagree_are_refused(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "a2d_qwen3", tmp_path / "m"))
    (folder / "model.safetensors").chmod(0o644)
    folder.chmod(0o755)
    tensors = load_file(folder / "model.safetensors")
    assert load_model(open_checkpoint(str(folder)), "qwen3", torch.float32) is not None
    save_file(
        {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1},
        folder / "new.safetensors",
        {"format": "pt"},
    )
    (folder / "new.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(TideError, match=r"to which config.json ties it"):
        load_model(open_checkpoint(str(folder)), "qwen3", torch.float32)


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="there is no folder"):
        open_checkpoint(str(tmp_path / "none"))
    with pytest.raises(TideError, match=r"no readable config.json"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(TideError, match="could not be fetched from the hub"):
        open_checkpoint("nobody/nothing")


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
    fields = 'model = "/m"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = false\nlength = 9\nstudent = "/s"\n'
    file.write_text(f'[mine]\n{fields}attention = {{ type = "block_causal", block = 4 }}\n')
    assert find_teacher("mine", file).mask_id == 5
    assert "llada-8b" in all_teachers(file)
    with pytest.raises(TideError, match="did you mean llada-8b"):
        find_teacher("llada-8")
    file.write_text(f"[mine]\n{fields}maskid = 3\n")
    with pytest.raises(TideError, match="maskid: no such setting"):
        find_teacher("mine", file)
    file.write_text("mine = 3\n")
    with pytest.raises(TideError, match="mine is a value"):
        find_teacher("mine", file)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_quantised_linear_layers(tmp_path: Path, kind: Any, limit: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    exact = load_model(open_checkpoint(str(tmp_path)), "llama", torch.float32)
    packed = load_model(open_checkpoint(str(tmp_path)), "llama", torch.float32, quantization=kind)
    assert {p.dtype for n, p in packed.named_parameters() if "proj" in n} == {
        torch.int8 if kind == "int8" else torch.uint8
    }
    assert torch.equal(packed.lm_head.weight, exact.lm_head.weight)  # the head keeps its precision
    ids = torch.randint(0, 4000, (2, 16))
    with torch.inference_mode():
        a, b = exact(input_ids=ids).logits, packed(input_ids=ids).logits
    difference = ((a - b).norm() / a.norm()).item()
    assert 0 < difference < limit


def test_stacked_experts_are_not_quantised(golden: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(TideError, match=r"stacked tensors[\s\S]*device_map"):
        load_model(
            open_checkpoint(str(golden / "llada_moe")),
            "llada_moe",
            torch.float32,
            quantization="int4",
        )


def test_quantization_without_its_library(
    random_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TideError, match=r"\[quant\]"):
        load_model(
            open_checkpoint(str(random_teacher)), "llama", torch.float32, quantization="int8"
        )


@pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
def test_a_device_map_changes_no_value(random_teacher: Path, kind: Any) -> None:
    """Without a GPU all parts lie on the CPU; the hooks that would move activations run all the same."""
    exact = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    mapped = load_model(
        open_checkpoint(str(random_teacher)), "llama", torch.float32, device_map=kind
    )
    mapping = plan_devices(
        meta_model("llama", open_checkpoint(str(random_teacher)).config), kind, torch.float32
    )
    spread(
        mapped,
        {**dict.fromkeys(["model.layers.0", "model.layers.1"], "cpu"), **mapping},
        force_hooks=True,
    )
    ids = torch.randint(0, 4000, (2, 16))
    with torch.inference_mode():
        assert torch.equal(exact(input_ids=ids).logits, mapped(input_ids=ids).logits)


def test_parts_without_any_place_are_named(
    random_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "get_max_memory", lambda: {0: 400_000, "cpu": 100_000})
    model = meta_model("llama", open_checkpoint(str(random_teacher)).config)
    with pytest.raises(TideError, match="too small for the teacher"):
        plan_devices(model, "sequential", torch.float32)
    monkeypatch.setattr(devices, "get_max_memory", lambda: {0: 1_100_000, 1: 2_000_000, "cpu": 1})
    mapping = plan_devices(model, "sequential", torch.float32)
    assert mapping["lm_head"] == 1
    assert 0 in mapping.values()
    places = {"model": "cpu", "model.layers.1": "meta", "lm_head": "meta"}
    assert device_of(places, "model.layers.0.mlp.up_proj.weight") == torch.device("cpu")
    assert device_of(places, "model.layers.1.mlp.up_proj.weight") == torch.device("meta")
    with pytest.raises(KeyError):
        device_of({"lm_head": "cpu"}, "model.norm.weight")


def _small(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory accounts")
def test_loading_a_checkpoint_of_many_shards_takes_the_memory_of_the_model_and_one_shard(
    tmp_path: Path,
) -> None:
    """Measured in a process of its own: resident memory at its peak, less what was there before loading."""
    config = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
                         num_attention_heads=8, tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    index, names = {}, sorted(shapes)
    for i in range(0, len(names), 10):
        file = f"model-{i:03d}.safetensors"
        save_file(
            {n: torch.ones(shapes[n], dtype=torch.bfloat16) for n in names[i : i + 10]},
            tmp_path / file,
        )
        index |= dict.fromkeys(names[i : i + 10], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.save_pretrained(tmp_path)
    script = f"""
import re, torch
from pathlib import Path
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model

def high_water():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_model(open_checkpoint({str(_small(tmp_path / "small"))!r}), "llama", torch.float32)  # libraries are in memory then
before = high_water()
load_model(open_checkpoint({str(tmp_path)!r}), "llama", torch.float32)
print(high_water() - before)
"""
    peak = int(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
    )
    model = sum(
        4 * s.numel() for s in shapes.values()
    )  # loaded as float32, so nothing stays mapped from the files
    shard = max(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert 0.95 * model < peak < model + 1.2 * shard
