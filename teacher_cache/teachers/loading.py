"""Load a checkpoint as a stock transformers model: tensor by tensor, every one used, every parameter filled."""

from __future__ import annotations

import hashlib
import json
import math
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
from teacher_cache.teachers.key_maps import Placement, place


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
    filler = _Filler(model, config, checkpoint, dtype, torch.device(device))
    for key, tensor in _tensors(checkpoint.weight_files):
        filler.take(key, tensor, place(key, kind.rules, config))
    filler.finish(architecture)
    model.tie_weights()
    return model.to(device=device).eval()


class _Filler:
    """Puts tensors where they belong and keeps account: every one used once, every element filled once."""

    def __init__(
        self, model: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model, self._folder, self._dtype, self._device = model, checkpoint.folder, dtype, device
        self._tied = bool(config.tie_word_embeddings)
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._buffers = {name for name, _ in model.named_buffers()}
        if self._tied:
            self._shapes.pop("lm_head.weight", None)
        self._filled: dict[str, int] = dict.fromkeys(self._shapes, 0)
        self._unknown: list[str] = []

    def take(self, key: str, tensor: torch.Tensor, places: list[Placement]) -> None:
        """Place one tensor of the checkpoint."""
        if not places:
            self._unknown.append(key)
        for spot in places:
            tied_head = self._tied and spot.name == "lm_head.weight"
            name = "model.embed_tokens.weight" if tied_head else spot.name
            if name not in self._shapes:
                self._unknown.append(key)
                continue
            part = tensor if spot.source is None else tensor[spot.source]
            self._put(key, name, part, spot)
        used = sum(s.source.stop - s.source.start for s in places if s.source is not None)
        if used and used != tensor.shape[0]:
            raise self._misfit(key, tuple(tensor.shape), (used, *tensor.shape[1:]))

    def _put(self, key: str, name: str, tensor: torch.Tensor, spot: Placement) -> None:
        shape = self._shapes[name]
        whole = spot.expert is None and spot.rows is None
        target = self._tensor_at(name, shape, allocate=not whole)
        slab = target if spot.expert is None else target[spot.expert : spot.expert + 1]
        view = slab if spot.rows is None else slab[:, spot.rows] if spot.expert is not None else slab[spot.rows]
        wanted = tuple(view.shape) if spot.expert is None else tuple(view.shape[1:])
        if tuple(tensor.shape) != wanted or (spot.expert is not None and view.shape[0] != 1):
            raise self._misfit(key, tuple(tensor.shape), wanted)
        dtype = torch.float32 if name in self._buffers else self._dtype
        moved = tensor.to(device=self._device, dtype=dtype)
        if whole and self._filled[name]:  # tied weights that the checkpoint stores twice must agree
            if not torch.equal(target.detach(), moved):
                raise TideError(f"{key} differs from {name}, to which config.json ties it", fix="mend the checkpoint")
            return
        if whole:
            self._assign(name, moved)
        else:
            view.copy_(moved.view(view.shape))
        self._filled[name] += tensor.numel()

    def _tensor_at(self, name: str, shape: tuple[int, ...], allocate: bool) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self._model.get_submodule(owner), leaf)
        if allocate and not self._filled[name]:
            self._assign(name, torch.empty(shape, dtype=self._dtype, device=self._device))
            tensor = getattr(self._model.get_submodule(owner), leaf)
        return tensor.data

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if name in self._buffers:
            setattr(module, leaf, tensor)
        else:
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))

    def _misfit(self, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> TideError:
        return TideError(
            f"{key} has the shape {found}",
            expected=f"{expected}, as config.json says",
            fix="check that config.json and weights belong together",
        )

    def finish(self, architecture: str) -> None:
        """TideError where a tensor found no place or a parameter is not filled exactly once."""
        gaps = sorted(n for n, shape in self._shapes.items() if self._filled[n] != math.prod(shape))
        if self._unknown or gaps:
            raise TideError(
                f"{self._folder} does not fit its architecture {architecture}: {len(self._unknown)} tensors without "
                f"a place {self._unknown[:5]}, {len(gaps)} parameters unfilled {gaps[:5]}",
                expected="every tensor used once and every parameter filled",
                fix="check that config.json and weights belong together",
            )
