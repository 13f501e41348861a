"""The two tokenizers of the embedded pair, trained on the standard-library corpus.

The teacher's (4,096 tokens, Llama-3-style headers) also serves the student that shares it; the
other student's (2,048 tokens, ChatML, single digits) cuts the same text differently, as Qwen's does
LLaDA's.
"""

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
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words with a leading space, numbers, runs of punctuation, indentation: as GPT-4's, cut shorter.
TEACHER_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n\s*|\s+(?!\S)|\s+"


def train_teacher_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write the teacher's tokenizer to `folder`."""
    words = pre_tokenizers.Split(Regex(TEACHER_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mask|>",
    ]
    _train(texts, folder, 4096, [words, as_bytes], special, "<|endoftext|>", HEADER_TEMPLATE)


def train_student_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write the other student's tokenizer to `folder`."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    _train(texts, folder, 2048, [digits, as_bytes], special, "<|im_end|>", CHATML_TEMPLATE)


def _train(
    texts: Iterable[str],
    folder: Path,
    size: int,
    steps: list[pre_tokenizers.PreTokenizer],
    special: list[str],
    eos: str,
    template: str,
) -> None:
    """A byte-level BPE of `size` tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[attr-defined]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", mask_token="<|mask|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
