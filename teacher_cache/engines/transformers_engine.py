"""The reference engine: a stock transformers model.

Requests are packed and batched (`packs`), run through the layers, and the LM head reads some rows
at a time: what is kept of their logits leaves the device, the logits never do. Under full attention
the sequences of a batch lie one behind the other, without padding and mask; under block attention
flex_attention skips what is hidden (compiled, on one GPU, in half precision).
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from shared.cache.row import Tables
from shared.models.flex import FLEX
from shared.models.loading import compile_layers
from teacher_cache import method
from teacher_cache.engines import packs as layout
from teacher_cache.engines.packs import Batch, Pack
from teacher_cache.method import Request, Scores, TailEncoder, TargetSpec
from teacher_cache.teachers.registry import Attention, Full

PACKED_ATTENTION = "tide_packed"
HALVES = (torch.float16, torch.bfloat16)  # for which attention has kernels on CUDA


def halving(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Again in passes half as large, from then on, where memory was too short for one."""

    def tried(self: Any, requests: Sequence[Request]) -> Any:
        while True:
            try:
                return answer(self, requests)
            except RuntimeError as error:
                if self._tokens_per_batch < 2 or not should_reduce_batch_size(error):
                    raise
            self._tokens_per_batch = n = self._tokens_per_batch // 2
            self._head_rows = max(1, self._head_rows // 2)
            warnings.warn(f"out of memory: {n} tokens a pass from here on", stacklevel=2)

    return tried


class TransformersEngine:
    """Scores requests with `model`. Values do not depend on which requests are scored together.

    `shift`: row i of the model predicts token i + 1 (Dream). `shared_ids`: only ids marked True
    enter a top-k. `compiled`: decoder layers by torch.compile, attention with them.
    """

    def __init__(
        self,
        model: Any,
        attention: Attention,
        spec: TargetSpec,
        *,
        shift: bool = False,
        tokens_per_batch: int = 16384,
        head_rows: int = 1024,
        shared_ids: Bool[np.ndarray, " vocab"] | None = None,
        compiled: bool = False,
    ) -> None:
        self._model = model.eval()
        places = {weight.device for weight in model.parameters()}  # a block mask lies on one
        on_one_gpu = len(places) == 1 and model.device.type == "cuda"
        if isinstance(attention, Full):
            AttentionInterface.register(PACKED_ATTENTION, packed_attention)
            model.set_attn_implementation(PACKED_ATTENTION)
        elif compiled and on_one_gpu and model.dtype in HALVES:
            model.set_attn_implementation(FLEX)
        if compiled:
            compile_layers(model)
        self._attention, self._spec, self._shift = attention, spec, int(shift)
        self._tokens_per_batch, self._head_rows = tokens_per_batch, head_rows
        # Of rows on CUDA: batches of all sizes would leave its allocator's memory in pieces.
        self._multiple = 64 if model.get_input_embeddings().weight.is_cuda else 1
        self._excluded: Tensor | None = None
        if shared_ids is not None:
            excluded = method.excluded_ids(shared_ids, model.config.vocab_size)
            self._excluded = torch.from_numpy(excluded)
        self._encoder: TailEncoder | None = None

    def use_tables(self, tables: Tables) -> None:
        """From now on scores hold what these tables say of the tail."""
        self._encoder = TailEncoder(tables, self._spec.temperatures)

    @halving
    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores of each request, in order; the LM head runs at the read positions only."""
        scores: dict[int, Scores] = {}
        for packs in self.batches(requests):
            # 1. What is kept of all rows of the batch, field by field.
            parts = self.readings(packs, requests)
            # 2. Cut where one request's rows end and the next one's begin.
            members = [i for pack in packs for i in pack.members]
            ends = np.cumsum([len(requests[i].read) for i in members])[:-1]
            fields = {}
            for name in parts[0]:
                whole = torch.cat([part[name] for part in parts]).cpu().numpy()
                fields[name] = np.split(whole, ends)
            for n, i in enumerate(members):
                scores[i] = {name: cells[n] for name, cells in fields.items()}
        return [scores[i] for i in range(len(requests))]

    @halving
    @torch.inference_mode()
    def hidden_states(self, requests: Sequence[Request]) -> Float[Tensor, "positions width"]:
        """Last hidden states at all read positions, request by request, in float32 on the CPU."""
        states: dict[int, Tensor] = {}
        for packs in self.batches(requests):
            members = [i for pack in packs for i in pack.members]
            sizes = [len(requests[i].read) for i in members]
            parts = self.hidden(self.batch(packs)).float().cpu().split(sizes)
            states |= dict(zip(members, parts, strict=True))
        return torch.cat([states[i] for i in range(len(requests))])

    def close(self) -> None:
        """Nothing to give back: the model goes with the engine."""

    def batches(self, requests: Sequence[Request]) -> list[list[Pack]]:
        budget, padded = self._tokens_per_batch, not isinstance(self._attention, Full)
        packs = layout.pack_requests(self._attention, requests, self._shift, budget)
        widths = [-(-len(pack.ids) // self._multiple) * self._multiple for pack in packs]
        batches = layout.fill(widths, budget, padded)
        return [[packs[i] for i in batch] for batch in batches]

    def batch(self, packs: Sequence[Pack]) -> Batch:
        device = self._model.get_input_embeddings().weight.device
        if isinstance(self._attention, Full):
            return layout.one_behind_the_other(packs, device, self._multiple)
        flex = self._model.config._attn_implementation == FLEX
        return layout.side_by_side(packs, device, self._multiple, flex)

    def hidden(self, batch: Batch) -> Float[Tensor, "read width"]:
        """Last hidden states at the read positions, in the order of the packs."""
        arguments, row, column = batch
        last = self._model.model(**arguments, use_cache=False).last_hidden_state
        # Under a device map it lies on the last layer's device.
        return last[row.to(last.device), column.to(last.device)]

    def readings(
        self, packs: Sequence[Pack], requests: Sequence[Request]
    ) -> list[dict[str, Tensor]]:
        """What is kept of one batch's logits (see `extract`), some rows at a time."""
        hidden = self.hidden(self.batch(packs))
        gold = np.concatenate([requests[i].gold for pack in packs for i in pack.members])
        answers, parts = torch.from_numpy(gold.astype(np.int64)).to(hidden.device), []
        for start in range(0, len(gold), self._head_rows):
            rows = slice(start, start + self._head_rows)
            logits = self._model.lm_head(hidden[rows])
            device = logits.device
            if self._excluded is not None:  # moved once, to where the head is
                self._excluded = self._excluded.to(device)
            read, right = hidden[rows].to(device), answers[rows].to(device)
            parts.append(
                method.extract(logits, read, right, self._spec, self._excluded, self._encoder)
            )
        return parts


def packed_attention(
    _module: Any,
    query: Float[Tensor, "1 heads rows depth"],
    key: Float[Tensor, "1 kv_heads rows depth"],
    value: Float[Tensor, "1 kv_heads rows depth"],
    _mask: Tensor | None = None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Float[Tensor, "1 rows heads depth"], None]:
    """Full attention inside each sequence of a packed batch, in transformers' form."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in HALVES:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        ends, longest = arguments["cu_seq_lens_q"], arguments["max_length_q"]
        sizes = (ends, ends, longest, longest)
        out: Any = varlen_attn(q, k, v, *sizes, scale=scale, enable_gqa=grouped)
        return out[None], None
    ends = arguments["cu_seq_lens_k"]
    return torch.ops.tide.packed_attention(query, key, value, ends, scale), None


# One operator, so that a compiled layer is the same for any number of sequences.
_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor ends, float scale) -> Tensor"


@torch.library.custom_op("tide::packed_attention", mutates_args=(), schema=_SCHEMA)
def _one_by_one(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Sequence by sequence, where PyTorch has no kernel for all: on a CPU, and in float32."""
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    grouped = query.shape[1] != key.shape[1]
    for start, end in itertools.pairwise(ends.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        one = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        out[:, start:end] = one.transpose(1, 2)
    return out


@_one_by_one.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
