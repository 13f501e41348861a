"""The two tokenizers of the embedded pair, trained on the standard-library corpus.

The teacher's (4,096 tokens, Llama-3-style headers) also serves the student that shares it; the other student's
(2,048 tokens, ChatML, single digits) cuts the same text differently, as Qwen's does LLaDA's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HEADER_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words with a leading space, numbers, runs of punctuation, indentation: like the GPT-4 pattern, cut shorter.
_TEACHER_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n\s*|\s+(?!\S)|\s+"


def _train(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    size: int,
    special: list[str],
    template: str,
    roles: dict[str, str],
) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = template
    return fast


def train_teacher_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write the teacher's tokenizer to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [
            pre_tokenizers.Split(Regex(_TEACHER_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = [
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mask|>",
    ]
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    _train(tokenizer, texts, 4096 - len(special), special, HEADER_TEMPLATE, roles).save_pretrained(
        folder
    )


def train_student_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write the other student's tokenizer to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    _train(tokenizer, texts, 2048 - len(special), special, CHATML_TEMPLATE, roles).save_pretrained(
        folder
    )
