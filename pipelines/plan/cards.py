"""GPUs by what their makers state, and the share of it that is reached."""

from __future__ import annotations

from dataclasses import dataclass

from shared.system.errors import TideError


@dataclass(frozen=True)
class Card:
    """A GPU. Peaks as stated for dense bfloat16 products that add up in float32."""

    name: str
    memory: float
    """Bytes."""
    tflops: float
    terabytes: float
    """A second."""
    products: float = 0.61
    """Share of the peak that large products reach."""
    copies: float = 0.84
    """Share of the bandwidth that element-wise kernels reach."""
    launch: float = 6e-6
    """Seconds in which Python starts a kernel."""

    def seconds(self, flops: float, amount: float) -> float:
        """Time of a kernel by roofline: its products, or its bytes, whichever take longer."""
        return max(
            flops / (self.tflops * 1e12 * self.products),
            amount / (self.terabytes * 1e12 * self.copies),
        )


CARDS = {
    "h100": Card("H100 SXM", 80e9, 989, 3.35),
    "h200": Card("H200", 141e9, 989, 4.8),
    "a100": Card("A100 80 GB", 80e9, 312, 2.04),
    "4090": Card("RTX 4090", 24e9, 165, 1.008),
    "l40s": Card("L40S", 48e9, 362, 0.864),
}


def find_card(name: str) -> Card:
    """The card of that name. TideError where there is none."""
    if name.lower() not in CARDS:
        raise TideError(f"unknown GPU {name!r}", expected=f"one of {', '.join(CARDS)}")
    return CARDS[name.lower()]
