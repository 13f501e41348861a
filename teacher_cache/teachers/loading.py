"""Load a checkpoint as a stock transformers model: tensor by tensor, every one used, every parameter filled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from shared.errors import TideError
from teacher_cache.teachers.architectures import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and safetensors weights, and what the config says."""

    folder: Path
    config: dict[str, Any]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, all that the index names where there is one."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.folder / name).exists()]
            if missing:
                raise TideError(
                    f"{self.folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:5])}",
                    fix="download the checkpoint again",
                )
            return [self.folder / name for name in names]
        single = self.folder / "model.safetensors"
        files = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickled = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            raise TideError(
                f"{self.folder} has no safetensors weights" + (f", only pickled ones: {pickled}" if pickled else ""),
                expected="model.safetensors, or shards with model.safetensors.index.json",
                fix="convert the weights to safetensors; pickles can run code and are never loaded",
            )
        return files

    def fingerprint(self) -> str:
        """A hash over the config and the bytes of all weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.weight_files:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()[:32]


def open_checkpoint(location: str) -> Checkpoint:
    """Find a checkpoint by path or hub id (fetched if need be) and read its config."""
    folder = Path(location)
    if not folder.is_dir():
        if location.startswith((".", "/", "~")) or location.count("/") != 1:
            raise TideError(f"there is no folder {location}", expected="a checkpoint's folder, or a hub id OWNER/NAME")
        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
            folder = Path(snapshot_download(location, allow_patterns=patterns))
        except Exception as error:  # the hub client raises many types, all about reaching or finding the model
            raise TideError(
                f"{location} could not be fetched from the hub: {str(error).splitlines()[0]}",
                expected="a folder, or a hub id that can be reached",
                fix="check the name and the network, or download the model and give its path (--model PATH)",
            ) from error
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TideError(
            f"{folder} has no readable config.json: {error}", fix="download the checkpoint again"
        ) from error
    return Checkpoint(folder, config)


def _architecture(checkpoint: Checkpoint, name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise TideError(f"unknown architecture {name!r}", expected=f"one of {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[name]
    found = checkpoint.config.get("model_type")
    if found not in architecture.model_types:
        raise TideError(
            f"{checkpoint.folder} has a config of model_type {found!r}",
            expected=f"{' or '.join(map(repr, architecture.model_types))} for the architecture {name}",
            fix="choose the teacher that this checkpoint belongs to, or another checkpoint",
        )
    return architecture


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    yield key, handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise TideError(f"{file} is no whole safetensors file: {error}", fix="download this file again") from error


def load_model(
    checkpoint: Checkpoint, architecture: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model on `device` in `dtype`, in evaluation mode, under SDPA attention.

    Host memory stays at the model plus one tensor. TideError names tensors that nothing takes, parameters that
    nothing fills, and shapes that do not match.
    """
    kind = _architecture(checkpoint, architecture)
    try:
        config = kind.config(checkpoint.config)
    except KeyError as error:
        raise TideError(f"the config of {checkpoint.folder} lacks {error}", fix="download config.json again") from error
    config._attn_implementation = "sdpa"
    with init_empty_weights():
        model: Any = kind.model_class(config)
    parameters = dict(model.named_parameters())
    filled: set[str] = set()
    unknown: list[str] = []
    tied = bool(config.tie_word_embeddings)
    if tied:
        parameters.pop("lm_head.weight", None)
    for key, tensor in _tensors(checkpoint.weight_files):
        places = kind.place(key)
        if not places:
            unknown.append(key)
        for place in places:
            name = "model.embed_tokens.weight" if tied and place.name == "lm_head.weight" else place.name
            if name not in parameters:
                unknown.append(key)
                continue
            _fill(model, name, tensor.to(device=device, dtype=dtype), key, name in filled)
            filled.add(name)
    missing = sorted(set(parameters) - filled)
    if unknown or missing:
        raise TideError(
            f"{checkpoint.folder} does not fit its architecture {architecture}: "
            f"{len(unknown)} tensors without a place {unknown[:5]}, {len(missing)} parameters unfilled {missing[:5]}",
            expected="every tensor used once and every parameter filled",
            fix="check that config.json and weights belong together",
        )
    model.tie_weights()
    return model.to(device=device).eval()


def _fill(model: PreTrainedModel, name: str, tensor: torch.Tensor, key: str, again: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    if tuple(old.shape) != tuple(tensor.shape):
        raise TideError(
            f"{key} has the shape {tuple(tensor.shape)}",
            expected=f"{tuple(old.shape)}, as config.json says",
            fix="check that config.json and weights belong together",
        )
    if again:  # tied weights that the checkpoint stores twice must agree
        if not torch.equal(old.to(tensor.device), tensor):
            raise TideError(f"{key} differs from {name}, to which config.json ties it", fix="mend the checkpoint")
        return
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
