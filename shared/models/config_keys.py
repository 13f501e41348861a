"""Every key of a checkpoint's config is obeyed, known to change nothing, or refused by name.

A key that no translation reads could change what the model computes, in silence. One that is off
(null, false, 0, empty) changes nothing. Of the others `HARMLESS` have no influence on logits, and
`FIXED` must have the value for which the transformers class is written; so must what an
architecture fixes of its own.
"""

from collections.abc import Mapping
from typing import Any

from shared.system.errors import TideError

HARMLESS = frozenset({
    # what it is, and who wrote it
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version",
    "tokenizer_class", "attn_implementation", "unsloth_version", "is_llama_config",
    "transformers.js_config", "model_max_length", "unsloth_fixed", "save_dtype", "language", "name",
    "license", "task_specific_params", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "prefix",
    # special ids, which are read elsewhere
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "sep_token_id",
    "decoder_start_token_id",
    # how text is generated: never by these keys here
    "max_length", "min_length", "num_beams", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "num_return_sequences", "num_beam_groups", "do_sample",
    "block_size", "mask_id", "wedlm_window_size", "wedlm_entropy_threshold",
    "wedlm_pos_penalty_factor", "generation_config",
    # how it is trained and run
    "use_cache", "return_dict", "return_dict_in_generate", "initializer_range", "init_device",
    "init_fn", "init_std", "init_cutoff_factor", "precision", "flash_attention", "use_flash_attn",
    "use_flash_attention", "router_aux_loss_coef", "output_router_logits", "pretraining_tp",
    "fuse_cross_entropy", "ep_size", "micro_forward", "skip_checkpoint", "use_deepep", "debug",
    "chunk_size_feed_forward",
    # of what is off: ALiBi, windows, the norm that attention_layer_norm would add
    "alibi_bias_max", "max_window_layers", "sliding_window", "attention_layer_norm_with_affine",
})  # fmt: skip

# The values that a key may have; none: any, since the key follows from others.
Fixed = Mapping[str, tuple[Any, ...]]

FIXED: Fixed = {
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
}


class Read(dict[str, Any]):
    """A config that knows which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's; the key counts as asked for."""
        self.keys_read.add(key)
        return super().get(key, default)


def refuse_unread(config: Read, own: Fixed, source: str) -> None:
    """TideError where a key that was not asked for may change what the model computes.

    `own`: what the architecture fixes.
    """
    fixed, read = {**FIXED, **own}, set(config.keys_read)
    unknown = []
    for key, value in config.items():
        # 1. A value for which the class is not written.
        allowed: tuple[Any, ...] = fixed.get(key, ())
        wrong = bool(allowed) and value is not None and value not in allowed
        if key == "layer_types":
            allowed = ("full_attention alone",)
            wrong = not isinstance(value, list | None) or set(value or ()) - {"full_attention"}
        if wrong:
            raise TideError(
                f"{key} in the config of {source} is {str(value)[:80]}, and no such model is built",
                expected=" or ".join(map(str, allowed)),
                fix="use another checkpoint",
            )
        # 2. A key that nothing reads. Notes of libraries begin with _; dropout is never used.
        known = key in read or key in fixed or key in HARMLESS or key == "layer_types"
        known = known or key.startswith("_") or key.endswith(("dropout", "pdrop"))
        off = value is None or value is False or value in (0, "", (), [], {})
        if not known and not off:
            unknown.append(f"{key} ({str(value)[:40]})")
    if unknown:
        raise TideError(
            f"the config of {source} has keys that nothing here reads, and that may change what "
            f"the model computes: {', '.join(unknown[:5])}",
            fix="if they change nothing, take them out of config.json in a copy of the folder; "
            "else use another checkpoint",
        )
