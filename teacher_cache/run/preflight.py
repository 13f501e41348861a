"""Can a run do what it is told to, where it is told to? Tried before any weight is read."""

import importlib.util
import logging
import os
import warnings
from dataclasses import replace
from typing import Any

import torch

from shared.cache.manifest import CachedEngine
from shared.cache.stores import Store
from shared.models.checkpoint import Checkpoint, refuse_as_mask, stated_mask
from shared.settings.config import CacheConfig
from shared.system.files import TideError, refuse_unwritable
from shared.system.hardware import choose_device, choose_precision, explain_precision
from shared.text.tokenizers import Tokenizer
from teacher_cache.engines.vllm_engine import why_not
from teacher_cache.prepared.folder import PreparedData, together
from teacher_cache.teachers.registry import TeacherEntry, find_teacher

logger = logging.getLogger(__name__)


def check_places(config: CacheConfig) -> None:
    """TideError for the first of device, GPUs, folders and store that is not there."""
    engine = config.engine
    if engine.workers == "local":
        choose_device(engine.device)
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = len(named.split(",")) if named else torch.cuda.device_count()
        most = visible // engine.tensor_parallel
        if visible and 1 < engine.data_parallel > most and engine.device in ("auto", "cuda"):
            by_name = f" (CUDA_VISIBLE_DEVICES={named})" if named else ""
            raise TideError(
                f"engine.data_parallel is {engine.data_parallel} with {engine.tensor_parallel} "
                f"GPUs each, and {visible} GPUs are visible{by_name}",
                expected=f"at most {most} copies",
                fix=f"lower it: --data-parallel {max(1, most)}, or --set engine.device=cpu",
            )
    refuse_unwritable(config.out)
    if config.metrics_file is not None:
        refuse_unwritable(config.metrics_file.parent)
    if config.store is not None:
        Store.open(config.store).sizes()


def ray_cluster() -> Any:
    """Ray, talking to the cluster at hand (`RAY_ADDRESS`, or the local one)."""
    if importlib.util.find_spec("ray") is None:
        what = "engine.workers is ray, and Ray is not installed"
        raise TideError(what, fix="pip install '.[ray]'")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError as error:
            what = "engine.workers is ray, and no Ray cluster answers"
            fix = "start one (`ray start --head`), or name it in RAY_ADDRESS"
            raise TideError(what, fix=fix) from error
    return ray


def settle_engine(config: CacheConfig, begun: CachedEngine | None = None) -> CacheConfig:
    """`config` with every `auto` of its engine decided but the device's: as the cache was begun, on
    whatever machine it is gone on with. TideError where the engine cannot run.
    """
    settings, kind = config.engine, config.engine.type
    if kind == "auto" and begun is not None:
        kind = begun.type
    if kind != "transformers":
        entry = find_teacher(config.teacher, config.teachers_file)
        problem = why_not(entry, replace(settings, type=kind))
        if problem is not None and kind == "vllm":
            raise problem
        kind = "vllm" if problem is None else "transformers"
    elif settings.tensor_parallel > 1:
        what = f"engine.tensor_parallel is {settings.tensor_parallel}: only vLLM splits tensors"
        fix = "use --engine vllm, or spread the teacher with engine.device_map=auto"
        raise TideError(what, fix=fix)
    dtype = settings.dtype
    # With Ray this machine only drives those that compute.
    of_cluster = settings.workers == "ray" and dtype == "auto" and begun is None
    if of_cluster and ray_cluster().cluster_resources().get("GPU"):
        dtype = "bfloat16"
    else:
        device, before = choose_device(settings.device), begun and begun.dtype
        dtype = choose_precision(settings.dtype, device, before)
        if settings.dtype == "auto":
            logger.info("engine.dtype %s", explain_precision(dtype, device, before))
    return replace(config, engine=replace(settings, type=kind, dtype=dtype))


def check_teacher(
    config: CacheConfig, entry: TeacherEntry, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    """TideError where entry, checkpoint, tokenizer and settings do not belong together."""
    rows = checkpoint.embedding_rows
    if len(tokenizer) > rows:
        what = f"the teacher's tokenizer has {len(tokenizer)} tokens, its embedding {rows}"
        raise TideError(what, fix="check that tokenizer and weights belong together")
    limits = ("max_position_embeddings", "max_sequence_length")
    limit = next((int(n) for key in limits if (n := checkpoint.config.get(key))), 0)
    own = not entry.student_tokens or config.targets.teacher_text == "own"
    side = "teacher" if own else "student"
    if 0 < limit < (needed := getattr(config.lengths, side)):
        what = f"the teacher would read {needed} tokens, but knows {limit} positions"
        raise TideError(what, fix=f"lower lengths.{side} to {limit} or less")
    # What the entry states must be what the checkpoint says.
    stated = stated_mask(checkpoint, tokenizer)
    facts = [
        ("vocabulary", entry.vocabulary, [rows]),
        ("mask_id", entry.mask_id, [entry.mask_id if stated is None else stated]),
        ("eos_id", entry.eos_id, checkpoint.special_ids("eos")),
        ("pad_id", entry.pad_id, checkpoint.special_ids("pad")),
    ]
    for what, ours, theirs in facts:
        agree = ours is None or not theirs or ours in theirs
        inside = what == "vocabulary" or all(0 <= i < rows for i in theirs)
        if not (agree and inside):
            says = f"{what} {', '.join(map(str, theirs))}, the entry {config.teacher} says {ours}"
            raise TideError(
                f"the checkpoint {checkpoint.folder} has {says}",
                expected=f"one and the same, below the {rows} rows of the embedding",
                fix=f"choose the teacher of this checkpoint, or correct {what} where it is wrong",
            )
    refuse_as_mask(entry.mask_id, tokenizer, checkpoint, f"the entry {config.teacher}")


def check_data(config: CacheConfig, shared_tokenizer: bool, data: PreparedData) -> None:
    """TideError where chunks are wanted and there are none; a warning where there are few."""
    if shared_tokenizer or "chunks" not in config.targets.signals:
        return
    sums = together(data.record.sources).counts
    lost, whole = sums.get("unaligned_bytes", 0), sums.get("response_bytes", 0)
    if not sums.get("chunks"):
        raise TideError(
            f"teacher {config.teacher} and its student share no chunk in {whole:,} response bytes",
            expected="two tokenizers whose tokens spell the same bytes",
            fix="look at `tide prepare --show 3`; choose another student tokenizer or teacher",
        )
    if lost > whole / 2:
        share = f"{lost / whole:.0%} of the response bytes are in no chunk of teacher and student"
        warnings.warn(f"{share}: they are trained by cross-entropy alone", stacklevel=2)
