"""The student: what it sees of [x_t ; x_0], by SDPA and flex_attention; what it is loaded from; and
its folder, as a run leaves it and in both layouts.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SmolLM3ForCausalLM,
)

from shared.cache.manifest import load_manifest
from shared.diffusion import block_diffusion_places
from shared.models.checkpoint import open_checkpoint
from shared.models.flex import FLEX
from shared.models.loading import load_model
from shared.settings.build import build
from shared.settings.config import StudentConfig, TrainConfig
from shared.system.files import TideError
from student_train.batches.collate import places_of_draws
from student_train.export import export_student, save_student, write_card
from student_train.model import flex_mask, load_student, masked_hidden
from student_train.using.student import load_for_use
from tests.conftest import STUDENT_TOKENIZER, TEACHER_TOKENIZER
from tests.plain_masks import block_diffusion
from tests.student_train.places import all_places, small

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def hidden_of(
    model: Any, noised: Tensor, clean: Tensor, lengths: list[int], block: int, mask: int
) -> Tensor:
    """At masked positions, from the needed rows alone."""
    inside = torch.arange(clean.shape[1]) < torch.tensor(lengths)[:, None]
    row, column = (inside & (noised == mask)).nonzero(as_tuple=True)
    masked = [column[row == i].numpy() for i in range(len(lengths))]
    places, place = places_of_draws([[m] for m in masked], lengths, block)
    return masked_hidden(model, noised, clean, places, place, block)


def test_golden_logits_at_masked_positions(golden: Path) -> None:
    model = load_model(open_checkpoint(str(golden / "a2d_qwen3")), "qwen3", torch.float32)
    expected = load_file(golden / "a2d_qwen3" / "expected.safetensors")
    noised, clean = expected["noised_ids"], expected["clean_ids"]
    lengths = [noised.shape[1]] * len(noised)
    with torch.no_grad():
        logits = model.lm_head(hidden_of(model, noised, clean, lengths, 4, mask=95))
    reference = expected["logits_bd3lm_block_4"][noised == 95]
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-5)


def test_flex_and_sdpa_agree_in_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients of flex_attention on a CPU, though its dense form has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model, results = small(), []
    clean = torch.randint(0, 49, (3, 64))
    noised = torch.where(torch.rand(clean.shape) < 0.5, 49, clean)
    for name in ("sdpa", FLEX):
        model.set_attn_implementation(name)
        hidden = hidden_of(model, noised, clean, [37, 64, 5], 8, 49)
        loss = hidden.flatten() @ torch.linspace(-1, 1, hidden.numel())
        gradients = torch.autograd.grad(loss, list(model.model.parameters()))
        scaled = torch.cat([g.flatten() / g.abs().max() for g in gradients])
        results.append((hidden.detach(), scaled))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 9), st.randoms())
def test_masks_of_places_are_block_diffusions(lengths: list[int], block: int, random: Any) -> None:
    width, places = max(lengths), all_places(lengths)
    kept = sorted(random.sample(range(2 * width), random.randint(1, 2 * width)))
    whole = block_diffusion(width, block)
    for chosen in (places, places[:, kept], places.reshape(1, -1)):
        made = flex_mask(chosen, width, block)
        dense = create_mask(made.mask_mod, len(chosen), 1, *[chosen.shape[1]] * 2, device="cpu")
        assert dense.equal(block_diffusion_places(chosen, width, block))
        for mask, row in zip(dense[:, 0], chosen, strict=True):
            own, example = row % (2 * width), row // (2 * width)
            seen = whole[own[:, None], own] & (example[:, None] == example) & (row >= 0)
            seen[row < 0] = False  # but for itself
            assert mask.equal(seen | torch.eye(len(row), dtype=torch.bool))


def test_a_pair_reads_two_small_labels_of_either_side() -> None:
    """Of every pair in a tile that is seen in part, of which there are most."""
    index = torch.arange(6)
    rule = flex_mask(all_places([3, 3]), 3, 2).mask_mod
    graph = make_fx(rule)(index % 2, index * 0, index, index.flip(0)).graph
    read = [
        node.meta["val"].dtype for node in graph.nodes if node.target is torch.ops.aten.index.Tensor
    ]
    assert read == [torch.int32] * 4


def test_new_lengths_compile_nothing_anew() -> None:
    """Traced as on CUDA, by a backend that counts. A few shapes are special to the tracer (one tile
    only; a batch size that is also the number of heads) and may make a graph of their own.
    """
    counter = CompileCounter()
    attend: Any = torch.compile(flex_attention, backend=counter, dynamic=True)
    torch._dynamo.reset()

    def graphs_after(widths: list[list[int]]) -> int:
        for lengths in widths:
            places, length = all_places(lengths), max(lengths)
            q, k, v = torch.randn(3, len(lengths), 2, 2 * length, 16)
            out = attend(q, k, v, block_mask=flex_mask(places, length, 8))
            dense = block_diffusion_places(places, length, 8)
            expected = scaled_dot_product_attention(q, k, v, attn_mask=dense)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    few = graphs_after([[64, 40], [64, 40, 7], [96, 33], [128, 3, 4]])
    assert few <= 4
    assert graphs_after([[200, 33, 5], [128] * 4, [160, 7, 9, 1, 3], [32] * 3, [256, 9]]) == few


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_new_student_is_loaded_again(caches: dict[str, Path], tmp_path: Path, kind: Any) -> None:
    cache, manifest = caches["tiny-cross"], load_manifest(caches["tiny-cross"])
    shape: dict[str, Any] = {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32}
    model, tokenizer = load_student(StudentConfig(kind, **shape), cache, manifest)
    assert model.get_input_embeddings().weight.shape == (2048, 32)
    model.save_pretrained(tmp_path / "a")
    tokenizer.backend.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    again, asked = load_student(StudentConfig(checkpoint=str(tmp_path / "a")), cache, manifest)
    assert asked.template.source == tokenizer.template.source  # with which the cache was made
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad
    if kind == "llama":  # of which the reference has no student
        with pytest.raises(TideError):
            export_student(tmp_path / "a", tmp_path / "a2d", "a2d")


def test_checkpoints_that_do_not_fit(caches: dict[str, Path], golden: Path, tmp_path: Path) -> None:
    cache, manifest = caches["tiny-cross"], load_manifest(caches["tiny-cross"])
    dream = shutil.copytree(golden / "dream", tmp_path / "Dream")
    shutil.copytree(STUDENT_TOKENIZER, dream, dirs_exist_ok=True)
    for folder, named in ((TEACHER_TOKENIZER, "tokenizer"), (dream, "Dream")):
        with pytest.raises(TideError, match=named):
            load_student(StudentConfig(checkpoint=str(folder)), cache, manifest)
    with pytest.raises(TideError, match="Dream"):
        export_student(golden / "dream", tmp_path / "x", "hf")
    with pytest.raises(TideError, match="a2d_qwen3"):  # would be overwritten
        export_student(golden / "a2d_qwen3", golden / "a2d_qwen3", "a2d")


@pytest.mark.parametrize(
    ("kind", "tied"),
    [(LlamaForCausalLM, True), (LlamaForCausalLM, False), (Qwen2ForCausalLM, True),
     (SmolLM3ForCausalLM, True)],
)  # fmt: skip
def test_an_embedding_grows_when_told(
    caches: dict[str, Path], tmp_path: Path, kind: Any, tied: bool
) -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
    config = kind.config_class(vocab_size=2000, **shape, **heads, tie_word_embeddings=tied)
    before: Any = kind(config)
    before.save_pretrained(tmp_path)
    if kind is Qwen2ForCausalLM:  # as published: beside "qwen2" transformers reads its tokenizer
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "a2d-qwen2"}))
    shutil.copytree(STUDENT_TOKENIZER, tmp_path, dirs_exist_ok=True)
    cache, manifest = caches["tiny-cross"], load_manifest(caches["tiny-cross"])
    with pytest.raises(TideError, match="2047"):
        load_student(StudentConfig(checkpoint=str(tmp_path)), cache, manifest)
    settings = StudentConfig(checkpoint=str(tmp_path), add_mask_row=True)
    model, tokenizer = load_student(settings, cache, manifest)
    for layer in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before.get_parameter(layer), model.get_parameter(layer)
        assert torch.equal(new[:2000], old)
        torch.testing.assert_close(new[2047], old.mean(dim=0))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 2048
    # What a run leaves behind is opened for use, and exported, as the same kind.
    save_student(model, tokenizer, tmp_path / "run")
    export_student(tmp_path / "run", tmp_path / "hf", "hf")
    student = load_for_use(str(tmp_path / "hf"), "cpu")
    assert type(student.model) is kind and student.special.mask == 2047
    assert student.block == manifest.fingerprint.lengths.block


def test_both_layouts_keep_every_bit_and_all_logits(golden: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(golden / "a2d_qwen3", tmp_path / "reference"))
    shutil.copytree(STUDENT_TOKENIZER, reference, dirs_exist_ok=True)
    export_student(reference, tmp_path / "hf", "hf")
    export_student(tmp_path / "hf", tmp_path / "a2d", "a2d")
    before, after = (load_file(f / "model.safetensors") for f in (reference, tmp_path / "a2d"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    path = tmp_path / "a2d" / "config.json"
    known = json.loads((reference / "config.json").read_text())
    written = json.loads(path.read_text())
    for name in known.keys() & written.keys() - {"transformers_version", "dtype", "use_cache"}:
        assert written[name] == known[name] or name == "_name_or_path", name
    assert {"rope_theta", "head_dim", "mask_token_id", "architectures"} <= written.keys()
    assert written["dtype"] == str(after["lm_head.weight"].dtype).removeprefix("torch.")
    # transformers knows no a2d-qwen3: what it calls the same model loads these very files.
    path.write_text(json.dumps({**written, "model_type": "qwen3"}))
    expected = load_file(reference / "expected.safetensors")
    for layout in ("hf", "a2d"):
        folder = tmp_path / layout
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # type: ignore
        assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        with torch.no_grad():
            full = torch.ones(2, 1, 16, 16, dtype=torch.bool)
            logits = model.eval()(expected["noised_ids"], attention_mask=full).logits
        torch.testing.assert_close(logits, expected["logits_full_attention"], rtol=0, atol=1e-5)


def test_the_card_has_the_sizes_and_the_origin_of_the_student_that_it_is(
    caches: dict[str, Path], golden: Path, tmp_path: Path
) -> None:
    shutil.copy(golden / "a2d_qwen3" / "config.json", tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    places = {
        "TIDE-dllm/distill-WeDLM-KL": "TIDE-dllm/distill-WeDLM-KL",
        "distill-LLaDA2-TIDE_Cross": "TIDE-dllm/distill-LLaDA2-TIDE_Cross",
        "models--me--small/snapshots/0a1b": "me/small",
        "ours/small": None,
    }
    for place, known in places.items():
        folder = tmp_path / place
        if "TIDE-dllm" not in place:
            folder.mkdir(parents=True)
        base = str(folder) if folder.is_dir() else place
        values = {"student": {"checkpoint": base}, "cache": "/c", "out": "/o"}
        write_card(tmp_path, build(TrainConfig, values), load_manifest(caches["tiny-cross"]), {})
        card: Any = ModelCard.load(tmp_path / "README.md")
        settings = json.loads(card.text.split("```json")[1].split("```")[0])["student"]
        sizes = (settings[name] for name in ("hidden_size", "layers", "heads", "kv_heads"))
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        assert tuple(sizes) == tuple(own[key] for key in keys)
        assert card.data.base_model == known and str(tmp_path) not in card.content
        assert (known or "a checkpoint") in card.text
        assert ("TIDE's authors" in card.text) == bool(known and "TIDE-dllm" in known)
