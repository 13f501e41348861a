"""The fast engine: vLLM scores all passes of a unit at once, batched without padding."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import Checkpoint
from shared.models.loading import check_weights
from shared.settings.config import EngineConfig
from shared.system.errors import TideError
from teacher_cache.engines.vllm_engine.plugin import SCORERS, unpack
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import Scores, TargetSpec, excluded_ids
from teacher_cache.teachers.registry import Full, TeacherEntry

_IGNORE_IS_CAUSAL = ("Glm4MoeForCausalLM", "Qwen3MoeForCausalLM")  # of vLLM 0.32's stock classes
_LOOK_SECONDS = 0.5  # between looks at vLLM's processes


def installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def why_not(entry: TeacherEntry, settings: EngineConfig) -> TideError | None:
    """Why vLLM cannot run this teacher so, or None. Nothing is imported."""
    if not isinstance(entry.attention, Full):
        return TideError(
            "the vLLM engine knows full attention only; this teacher runs under "
            f"{entry.attention.type}",
            expected="a teacher with full attention, or another engine",
            fix="use --engine transformers",
        )
    if settings.device_map is not None or settings.quantization is not None:
        return TideError(
            "engine.device_map and engine.quantization belong to the transformers engine",
            fix="use --engine transformers, or spread the teacher with --tensor-parallel",
        )
    if not installed():
        return TideError(
            "the vLLM engine is not installed",
            expected="vllm 0.32",
            fix='pip install ".[vllm]" (docs/engines.md has the CPU build), '
            "or use --engine transformers",
        )
    return None


class VllmEngine:
    """An `Engine`: the values of the transformers engine, up to the order of sums.

    TideError where one of vLLM's processes dies.
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
        problem = why_not(entry, settings)
        if problem is not None:
            raise problem
        check_weights(checkpoint, entry.architecture)
        self._spec, self._longest = spec, longest
        self._classes: Path | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tide-vllm-")
        _write_config(Path(self._folder.name), checkpoint, entry, spec, settings, shared_ids)
        before = set(multiprocessing.active_children())
        self._llm, self._params = _start(checkpoint, Path(self._folder.name), settings, longest)
        children = multiprocessing.active_children()
        self._processes = [child for child in children if child not in before]

    def score(self, requests: Sequence[Request]) -> list[Scores]:
        if not requests:
            return []
        too_long = max(len(request.ids) for request in requests)
        if too_long > self._longest:
            raise TideError(
                f"a sequence of {too_long} tokens came to a vLLM engine made for {self._longest}",
                fix="raise lengths.student: prompts grow where their added tokens are spelled out "
                "for the teacher",
            )
        classes = {} if self._classes is None else {"classes": str(self._classes)}
        return [unpack(data, self._spec) for data in self._ask(requests, classes)]

    def outside(self, requests: Sequence[Request]) -> Float[np.ndarray, "temperatures vocab"]:
        read = [request for request in requests if len(request.read)]
        sums = [data.double().numpy() for data in self._ask(read, {"outside": True})]
        return np.sum(sums, axis=0)

    def use_classes(self, class_of: Int[np.ndarray, " vocab"]) -> None:
        classes = int(class_of.max()) + 1
        self._spec, self._classes = dataclasses.replace(self._spec, classes=classes), None
        if classes > 1:
            self._classes = Path(self._folder.name) / "classes.npy"  # vLLM's processes read it
            np.save(self._classes, class_of)

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _ask(self, requests: Sequence[Request], more: dict[str, Any]) -> list[torch.Tensor]:
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
        while not wait([answer], timeout=_LOOK_SECONDS).done:
            if not all(process.is_alive() for process in self._processes):
                raise _stopped()
        error = answer.exception()
        if error is not None and type(error).__name__ == "EngineDeadError":
            raise _stopped() from error
        return answer.result()


def _stopped() -> TideError:
    return TideError(
        "the vLLM engine stopped: one of its processes died (killed, or out of memory)",
        expected="all of vLLM's processes alive to the end",
        fix="run the same command again: finished shards are kept. Where memory was short, lower "
        "engine.tokens_per_batch or engine.head_rows, or use more GPUs (--tensor-parallel)",
    )


def _write_config(
    folder: Path,
    checkpoint: Checkpoint,
    entry: TeacherEntry,
    spec: TargetSpec,
    settings: EngineConfig,
    shared_ids: Bool[np.ndarray, " vocab"] | None,
) -> None:
    """A config of the stock architecture, with what the scorer must know under `tide`."""
    kind = ARCHITECTURES[entry.architecture]
    config = kind.config(checkpoint.config)
    config.architectures = [SCORERS[kind.stock_class]]
    config.is_causal = False
    excluded = [] if shared_ids is None else excluded_ids(shared_ids, config.vocab_size).tolist()
    config.tide = {
        "architecture": entry.architecture,
        "shift": entry.shift,
        "k": spec.k,
        "mass": spec.mass,
        "temperatures": list(spec.temperatures),
        "head_rows": settings.head_rows,
        "excluded": excluded,
        "swap_attention": kind.stock_class in _IGNORE_IS_CAUSAL,
    }
    config.to_json_file(folder / "config.json")


def _start(
    checkpoint: Checkpoint, folder: Path, settings: EngineConfig, longest: int
) -> tuple[Any, Any]:
    """vLLM's engine, and its class of pooling parameters."""
    no_accelerator = settings.device == "auto" and not torch.accelerator.is_available()
    on_cpu = settings.device == "cpu" or no_accelerator
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, PoolingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        model=str(checkpoint.folder),
        hf_config_path=str(folder),
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
    return llm, PoolingParams
