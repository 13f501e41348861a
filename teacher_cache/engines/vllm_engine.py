"""The fast engine: vLLM scores all passes of a unit at once, batched without padding.

vLLM's own processes import this module too: the entry point `vllm.general_plugins` runs `register`.
What both sides share stands at the end.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.cache.row import Tables
from shared.cache.shards import TABLES, save_tables
from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import Checkpoint
from shared.models.loading import load_model
from shared.settings.config import EngineConfig
from shared.system.files import TideError
from shared.system.hardware import choose_device
from teacher_cache.method import Request, Scores, TargetSpec, excluded_ids
from teacher_cache.teachers.registry import Full, TeacherEntry

# The scorer of each stock transformers class that a teacher may load as.
SCORERS = {
    "LlamaForCausalLM": "TideLlamaScorer",
    "Qwen2ForCausalLM": "TideQwen2Scorer",
    "Qwen3ForCausalLM": "TideQwen3Scorer",
    "Qwen3MoeForCausalLM": "TideQwen3MoeScorer",
    "Glm4MoeForCausalLM": "TideGlm4MoeScorer",
}
_IGNORE_IS_CAUSAL = ("Glm4MoeForCausalLM", "Qwen3MoeForCausalLM")  # of vLLM 0.32's stock classes
_LOOK_SECONDS = 0.5  # between looks at vLLM's processes


def why_not(entry: TeacherEntry, settings: EngineConfig) -> TideError | None:
    """Why vLLM cannot run this teacher so, or None. Nothing is imported."""
    if not isinstance(entry.attention, Full):
        return TideError(
            f"the vLLM engine runs no {entry.attention.type} attention, which this teacher has",
            expected="a teacher with full attention, or another engine",
            fix="use --engine transformers",
        )
    if settings.device_map is not None or settings.quantization is not None:
        return TideError(
            "engine.device_map and engine.quantization belong to the transformers engine",
            fix="use --engine transformers, or spread the teacher with --tensor-parallel",
        )
    if importlib.util.find_spec("vllm") is None:
        how = 'pip install ".[vllm]" (docs/engines.md has the CPU build)'
        fix = f"{how}, or use --engine transformers"
        return TideError("the vLLM engine is not installed", expected="vllm 0.32", fix=fix)
    return None


class VllmEngine:
    """The values of the transformers engine, up to the order of sums; its methods in brief there.

    `longest`: tokens of the longest sequence. TideError where one of vLLM's processes dies.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        entry: TeacherEntry,
        spec: TargetSpec,
        settings: EngineConfig,
        longest: int,
        shared_ids: Bool[np.ndarray, " vocab"] | None = None,
    ) -> None:
        if (problem := why_not(entry, settings)) is not None:
            raise problem
        load_model(checkpoint, entry.architecture, torch.float32, "meta")  # an account of the files
        self._spec, self._longest = spec, longest
        self._tables: dict[str, str] = {}

        # 1. A config of the stock architecture, with what the scorer must know under `tide`.
        self._folder = tempfile.TemporaryDirectory(prefix="tide-vllm-")
        kind = ARCHITECTURES[entry.architecture]
        config = kind.config(checkpoint.config)
        config.architectures = [SCORERS[kind.stock_class]]
        config.is_causal = False
        excluded = [] if shared_ids is None else excluded_ids(shared_ids, config.vocab_size)
        config.tide = {
            "architecture": entry.architecture,
            "shift": entry.shift,
            "k": spec.k,
            "mass": spec.mass,
            "temperatures": list(spec.temperatures),
            "head_rows": settings.head_rows,
            "excluded": [int(i) for i in excluded],
            "swap_attention": kind.stock_class in _IGNORE_IS_CAUSAL,
        }
        config.to_json_file(Path(self._folder.name) / "config.json")

        # 2. vLLM, whose processes are those that were not there before.
        on_cpu = choose_device(settings.device).type == "cpu"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # with Triton it would be V2
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM, PoolingParams  # pyright: ignore[reportMissingImports]

        before = set(multiprocessing.active_children())
        self._params = PoolingParams
        self._llm = LLM(
            model=str(checkpoint.folder),
            hf_config_path=self._folder.name,
            runner="pooling",
            load_format="safetensors",
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=settings.dtype,
            max_model_len=longest,
            max_num_batched_tokens=max(settings.tokens_per_batch, longest),
            tensor_parallel_size=settings.tensor_parallel,
            enable_prefix_caching=False,
            enforce_eager=on_cpu,
            disable_log_stats=True,
        )
        self._processes = set(multiprocessing.active_children()) - before

    def score(self, requests: Sequence[Request]) -> list[Scores]:
        if not requests:
            return []
        if (longest := max(len(request.ids) for request in requests)) > self._longest:
            raise TideError(
                f"a sequence of {longest} tokens came to a vLLM engine made for {self._longest}",
                fix="raise lengths.student: the teacher's prompts have added tokens spelled out",
            )
        return [unpack(data, self._spec) for data in self._ask(requests, self._tables)]

    def hidden_states(self, requests: Sequence[Request]) -> Float[Tensor, "positions width"]:
        read = [request for request in requests if len(request.read)]
        return torch.cat(self._ask(read, {"hidden": True}))

    def use_tables(self, tables: Tables) -> None:
        self._spec = replace(self._spec, rank=tables.rank)
        folder = Path(self._folder.name)  # vLLM's processes read them there
        save_tables(folder / TABLES, tables)
        self._tables = {"tables": str(folder)}

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _ask(self, requests: Sequence[Request], more: dict[str, Any]) -> list[Tensor]:
        """What the pooler answers to each request."""
        prompts, params = [], []
        for request in requests:
            prompts.append({"prompt_token_ids": request.ids.tolist()})
            asked = {"positions": request.read.tolist(), "gold": request.gold.tolist(), **more}
            params.append(self._params(use_activation=False, extra_kwargs=asked))
        outputs = self._watched(
            lambda: self._llm.encode(prompts, params, pooling_task="token_classify", use_tqdm=False)
        )
        return [output.outputs.data.cpu() for output in outputs]

    def _watched(self, call: Callable[[], list[Any]]) -> list[Any]:
        """The result of `call`. vLLM 0.32 waits for ever where its core process is killed."""
        if not self._processes:
            return call()
        answer: Future[list[Any]] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # it belongs to the caller, in the other thread
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        alive = True
        while alive and not wait([answer], timeout=_LOOK_SECONDS).done:
            alive = all(process.is_alive() for process in self._processes)
        error = answer.exception() if answer.done() else None
        if not alive or type(error).__name__ == "EngineDeadError":
            raise TideError(
                "the vLLM engine stopped: one of its processes died (killed, or out of memory)",
                expected="all of vLLM's processes alive to the end",
                fix="run the same command again: finished shards are kept. Where memory was short, "
                "lower engine.tokens_per_batch or engine.head_rows, or use more GPUs",
            ) from error
        return answer.result()


def register() -> None:
    """Make every scorer known to vLLM. May run any number of times in one process."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    for name in set(SCORERS.values()) - set(ModelRegistry.get_supported_archs()):
        ModelRegistry.register_model(name, f"teacher_cache.engines.vllm_engine_models:{name}")


def field_shapes(spec: TargetSpec) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape at one position, and type, of each of the `Scores` that `spec` asks for.

    An answer is one float32 tensor a request, field beside field: a vLLM pooler can send back
    nothing else. Ids and sizes stay below 2²⁴ and are exact in float32.
    """
    shapes: dict[str, Any] = {"gold_logp": ((), np.float32), "logsumexp": ((), np.float32)}
    if spec.k:
        shapes |= {"topk_sizes": ((), np.int32), "topk_ids": ((spec.k,), np.int32)}
        shapes["topk_logp"] = ((spec.k,), np.float32)
        if spec.rank:
            shapes["tail_code"] = ((spec.rank,), np.float32)
            shapes["tail_level"] = ((len(spec.temperatures),), np.float32)
    return shapes


def columns_of(spec: TargetSpec) -> list[int]:
    return [math.prod(shape) for shape, _ in field_shapes(spec).values()]


def unpack(packed: Float[Tensor, "read columns"], spec: TargetSpec) -> Scores:
    """An answer as arrays of their own."""
    cells = np.split(packed.float().numpy(), np.cumsum(columns_of(spec))[:-1], axis=1)
    fields: Scores = {}
    for (name, (shape, dtype)), cell in zip(field_shapes(spec).items(), cells, strict=True):
        fields[name] = cell.reshape(len(packed), *shape).astype(dtype)
    return fields
