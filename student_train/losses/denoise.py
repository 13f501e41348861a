"""The denoising cross-entropy of masked diffusion (DESIGN §3)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from student_train.losses.log_masses import at_least_float32


def denoise(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"], t: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """w(t)·(−log p(gold)) per masked position, in nats, with w(t) = 1/t.

    The caller sums and divides by the number of maskable tokens of the batch.
    """
    return F.cross_entropy(at_least_float32(logits), gold, reduction="none") / t
