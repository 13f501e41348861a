"""Checkpoints are loaded whole or not at all; what strangers wrote is obeyed or refused."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import utils as accelerate_utils
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import compile_layers, load_model, meta_model
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer


@pytest.fixture
def copy(random_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_teacher, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def new_llama(width: int, kind: Any = LlamaConfig, **changes: Any) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 4096, "num_attention_heads": 4}
    return kind(tie_word_embeddings=False, **{**sizes, **changes})


def load(folder: Path, architecture: str = "llama", **more: Any) -> Any:
    return load_model(open_checkpoint(str(folder)), architecture, torch.float32, **more)


def refused(folder: Path, architecture: str = "llama") -> str:
    """What both the loader and the account of the headers alone say."""
    with pytest.raises(TideError) as error:
        load_model(open_checkpoint(str(folder)), architecture, torch.float32, "meta")
    with pytest.raises(TideError):
        load(folder, architecture)
    return str(error.value)


def test_the_weights_arrive_as_they_are_and_nothing_beside_them_plays_a_part(copy: Path) -> None:
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
    path, norm = copy / "model.safetensors", "model.norm.weight"
    content, tensors = path.read_bytes(), load_file(path)
    less = {k: v for k, v in tensors.items() if k != norm}
    extra, other = {**tensors, "a.weight": torch.zeros(1)}, {**tensors, norm: torch.zeros(31)}
    for named, tensors in (("a.weight", extra), (norm, less), ("(31,)", other)):
        save_file(tensors, path, {"format": "pt"})
        assert named in refused(copy)
    path.write_bytes(content[:-100])
    assert path.name in refused(copy)
    path.rename(copy / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(copy)
    edit_config(copy, model_type="gpt2")
    assert "gpt2" in refused(copy)


def test_a_missed_expert_of_a_stack_and_tied_weights_that_disagree_are_refused(
    golden: Path, tmp_path: Path
) -> None:
    tied = load(golden / "a2d_qwen3", "qwen3")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    both = (("llada_moe", "llada_moe", "down_proj"), ("a2d_qwen3", "qwen3", "lm_head"))
    for name, architecture, part in both:
        shutil.copytree(golden / name, tmp_path / name, copy_function=shutil.copy)
        path = tmp_path / name / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        path.unlink()
        key = max(key for key in tensors if part in key)
        tensor = tensors.pop(key)
        less = [{}, {key: tensor[:-1].contiguous()}]
        for change in less if part == "down_proj" else [{key: tensor + 1}]:
            save_file({**tensors, **change}, path, {"format": "pt"})
            with pytest.raises(TideError):
                load(path.parent, architecture)
            assert part == "lm_head" or refused(path.parent, architecture)


def test_a_teacher_saved_again_is_loaded_again(golden: Path, tmp_path: Path) -> None:
    """The renames of one layout are not those of another class."""
    load(golden / "llada", "llada")
    LlamaForCausalLM(new_llama(8, vocab_size=8)).save_pretrained(tmp_path)
    assert load(tmp_path).config.hidden_size == 8


def test_the_fingerprint_follows_config_and_weights(copy: Path) -> None:
    first = open_checkpoint(str(copy)).fingerprint()
    edit_config(copy, rms_norm_eps=1e-3)
    second = open_checkpoint(str(copy)).fingerprint()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert len({first, second, open_checkpoint(str(copy)).fingerprint()}) == 3


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_quantised_linear_layers(golden: Path, tmp_path: Path, kind: Any, limit: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    LlamaForCausalLM(new_llama(64)).save_pretrained(tmp_path)
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
    """In a process of its own; the mapped files count as well."""
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    LlamaForCausalLM(new_llama(8)).save_pretrained(small)
    model = LlamaForCausalLM(new_llama(1024)).bfloat16()
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
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model_class: Any = Qwen3ForCausalLM if architecture == "qwen3" else LlamaForCausalLM
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "vocab_size": 60}
    config = new_llama(32, model_class.config_class, max_position_embeddings=256, **more)
    model_class(config).save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=5000.0)
    for scaling in (None, {"type": "linear", "factor": 4.0}, yarn):  # of transformers 4
        edit_config(tmp_path, rope_scaling=scaling)
        expected = model_class.from_pretrained(tmp_path).eval()
        ids = torch.arange(40)[None]
        with torch.no_grad():
            ours, theirs = load(tmp_path, architecture)(ids).logits, expected(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


ARCHITECTURE_OF = {
    "a2d_qwen3": "qwen3", "llada": "llada", "dream": "dream", "wedlm": "qwen3",
    "llada_moe": "llada_moe", "llada2_moe": "llada2_moe", "step/teacher_cross": "llama",
}  # fmt: skip


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe"])
def test_layers_with_experts_are_compiled_whole(
    golden: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every kind of layer and all lengths, with all of the experts' products."""
    model, graphs = load(golden / name, ARCHITECTURE_OF[name]).eval(), []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda g, _: graphs.append(g.code) or g)
    )

    def run(length: int) -> torch.Tensor:
        seen = torch.ones(2, 1, length, length, dtype=torch.bool)
        ids = torch.arange(2 * length).reshape(2, length)
        return model.model(ids, attention_mask=seen, use_cache=False).last_hidden_state

    with torch.no_grad():
        plain = [run(length) for length in (5, 12, 9)]
        compile_layers(model)
        for values in plain:
            torch.testing.assert_close(run(values.shape[1]), values, rtol=1e-4, atol=1e-5)
    kinds = {hasattr(layer.mlp, "experts") for layer in model.model.layers}
    assert len(graphs) == len(kinds)
    assert sum("grouped_mm" in code for code in graphs) == 1


def test_published_configs_are_taken() -> None:
    published = json.loads(Path(__file__).with_name("published.json").read_text())
    for entry in published.values():
        meta_model(entry["architecture"], entry["config"])


def changed(golden: Path, name: str, **changes: Any) -> Any:
    config = json.loads((golden / name / "config.json").read_text())
    return meta_model(ARCHITECTURE_OF[name], {**config, **changes})


REFUSED: list[tuple[str, str, Any]] = [
    ("llada", "block_type", "sequential"), ("llada", "rope", False),
    ("llada", "multi_query_attention", True), ("llada_moe", "clip_qkv", 8.0),
    ("llada_moe", "partial_rotary_factor", 0.5), ("llada2_moe", "score_function", "softmax"),
    ("dream", "use_sliding_window", True), ("wedlm", "qk_norm", False),
    ("a2d_qwen3", "layer_types", ["full_attention", "sliding_attention"]),
    ("a2d_qwen3", "quantization_config", {"bits": 4}),
]  # fmt: skip


def test_what_is_not_built_or_read_by_nothing_is_refused_by_name(golden: Path) -> None:
    unknown = ((name, value) for name in ARCHITECTURE_OF for value in (8.0, True, [1], "on"))
    unread = [(name, "logits_scaling", value) for name, value in unknown]
    for name, key, value in [*REFUSED, *unread]:
        with pytest.raises(TideError, match=key):
            changed(golden, name, **{key: value})
    # What is off, a library's own notes and dropouts change nothing.
    off = {"logits_scaling": None, "embedding_multiplier": 0, "attn_logit_softcap": False}
    for name in ARCHITECTURE_OF:
        changed(golden, name, _name_or_path="y", attn_pdrop=0.1, is_llama_config=True, **off)
    # Transformers' own key is obeyed: with this one the model has biases.
    model = changed(golden, "step/teacher_cross", mlp_bias=True)
    assert any(name.endswith("up_proj.bias") for name, _ in model.named_parameters())


def test_the_published_moe_calls_itself_llada(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "llada_moe", tmp_path / "m", copy_function=shutil.copy)
    edit_config(folder, model_type="llada")
    load_model(open_checkpoint(str(folder)), "llada_moe", torch.float32, "meta")


def test_an_index_that_names_what_it_should_not(copy: Path) -> None:
    names: list[Any] = ["../model.safetensors", "/dev/zero", "model.bin", "", 3]
    for index in (*({"a": name} for name in names), {}, [], None):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        refused(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_none(name: str, copy: Path) -> None:
    path = copy / name
    links: list[Any] = [lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(name)]
    for harm in (os.mkfifo, *links, lambda p: p.write_text('{"a":' * 200_000)):
        path.unlink()
        harm(path)
        with pytest.raises(TideError):
            load(copy) if name != "tokenizer.json" else Tokenizer.load(copy)


def test_configs_of_no_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for changes in (
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": 0}, {"hidden_size": 10**30},
        {"vocab_size": "many"}, {"num_attention_heads": 1.5}, {"intermediate_size": [2]},
        {"hidden_act": "os.system"}, {"rope_parameters": 3}, {"num_key_value_heads": -1},
    ):  # fmt: skip
        edit_config(copy, **{**config, **changes})
        refused(copy)


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), str(tmp_path), "nobody/nothing", "a\0b", "a/\0b"):
        with pytest.raises(TideError):
            open_checkpoint(place)
