"""Load a checkpoint as a stock transformers model: tensor by tensor, every one used, every parameter filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from shared.models.architectures import ARCHITECTURES, Architecture
from shared.models.checkpoint import Checkpoint, stream_shapes, stream_tensors
from shared.models.config_keys import Read, refuse_unread
from shared.models.devices import DeviceMap, device_of, plan_devices, spread
from shared.models.key_maps import Placement, place
from shared.models.limits import refuse_sizes
from shared.models.quantize import Quantization, quantize_linears
from shared.system.errors import TideError


def _architecture(checkpoint: Checkpoint, name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise TideError(
            f"unknown architecture {name!r}", expected=f"one of {', '.join(sorted(ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES[name]
    found = checkpoint.config.get("model_type")
    if found not in architecture.model_types:
        raise TideError(
            f"{checkpoint.folder} has a config of model_type {found!r}",
            expected=f"{' or '.join(map(repr, architecture.model_types))} for the architecture {name}",
            fix="choose the teacher that this checkpoint belongs to, or another checkpoint",
        )
    return architecture


def load_model(
    checkpoint: Checkpoint,
    architecture: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    device_map: DeviceMap | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model on `device` in `dtype`, in evaluation mode, under SDPA attention.

    Host memory stays at the model plus one shard. `device_map` spreads the layers over several devices;
    `quantization` keeps linear layers in 8 or 4 bits. TideError names tensors that nothing takes, parameters that
    nothing fills, and shapes that do not match.
    """
    model = _empty_model(
        _architecture(checkpoint, architecture), checkpoint.config, str(checkpoint.folder)
    )
    home = torch.device("cpu" if quantization else device)
    mapping = None if device_map is None else plan_devices(model, device_map, dtype)
    filler = _Filler(
        model,
        checkpoint,
        dtype,
        (lambda _: home) if mapping is None else partial(device_of, mapping),
    )
    for key, tensor in stream_tensors(checkpoint.weight_files):
        filler.take(key, tensor, place(key, ARCHITECTURES[architecture].rules, model.config))
    filler.finish(architecture)
    model.tie_weights()
    if quantization is not None:
        quantize_linears(model, quantization, torch.device(device), dtype)
    model = model.to(device=device) if mapping is None else spread(model, mapping)
    return model.eval()


def check_weights(checkpoint: Checkpoint, architecture: str) -> None:
    """The same account of every tensor as in `load_model`, from names and shapes alone. TideError as there."""
    model = _empty_model(
        _architecture(checkpoint, architecture), checkpoint.config, str(checkpoint.folder)
    )
    filler = _Filler(model, checkpoint, torch.float32, lambda _: torch.device("meta"))
    for key, shape in stream_shapes(checkpoint.weight_files):
        tensor = torch.empty(shape, device="meta")
        filler.take(key, tensor, place(key, ARCHITECTURES[architecture].rules, model.config))
    filler.finish(architecture)


def _empty_model(kind: Architecture, raw: dict[str, Any], source: str) -> Any:
    """The model with its parameters on the meta device."""
    refuse_sizes(raw, source)
    read = Read(raw)
    try:
        config = kind.config(read)
        config._attn_implementation = "sdpa"
        refuse_unread(read, kind.fixed, source)
        with init_empty_weights():
            return kind.model_class(config)
    except TideError:
        raise
    except KeyError as error:
        raise TideError(
            f"the config of {source} lacks {error}", fix="download config.json again"
        ) from error
    except Exception as error:  # values that fit no model lead the library anywhere
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TideError(
            f"the config of {source} makes no model: {reason[:300]}",
            fix="download config.json again",
        ) from error


def meta_model(architecture: str, config: dict[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint's `config` without weights: true shapes on the meta device."""
    return _empty_model(ARCHITECTURES[architecture], config, "this teacher")


def random_model(
    architecture: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model with random weights (normal, standard deviation 0.02; norms 1), to measure speed and memory with."""
    model: Any = meta_model(architecture, config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        tensor = tensor.fill_(1.0) if parameter.dim() == 1 else tensor.normal_(std=0.02)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    return model.to(device=device).eval()


class _Filler:
    """Puts tensors where they belong and keeps account: every one used once, every element filled once."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device_of: Callable[[str], torch.device],
    ) -> None:
        self._model, self._folder, self._dtype, self._device_of = (
            model,
            checkpoint.folder,
            dtype,
            device_of,
        )
        self._tied = bool(model.config.tie_word_embeddings)
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
        view = (
            slab
            if spot.rows is None
            else slab[:, spot.rows]
            if spot.expert is not None
            else slab[spot.rows]
        )
        wanted = tuple(view.shape) if spot.expert is None else tuple(view.shape[1:])
        if tuple(tensor.shape) != wanted or (spot.expert is not None and view.shape[0] != 1):
            raise self._misfit(key, tuple(tensor.shape), wanted)
        dtype = torch.float32 if name in self._buffers else self._dtype
        moved = tensor.to(device=self._device_of(name), dtype=dtype)
        if whole and self._filled[name]:  # tied weights that the checkpoint stores twice must agree
            if not moved.is_meta and not torch.equal(target.detach(), moved):
                raise TideError(
                    f"{key} differs from {name}, to which config.json ties it",
                    fix="mend the checkpoint",
                )
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
            self._assign(name, torch.empty(shape, dtype=self._dtype, device=self._device_of(name)))
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
