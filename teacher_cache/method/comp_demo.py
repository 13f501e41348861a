"""CompDemo (TIDE §2.2): what the teacher sees and what is read from it.

The masked units are split into A and B. Pass 1 masks B, reveals A and reads B; pass 2 the reverse.
So the teacher answers with half of the answer at hand, while the student sees all of it masked.
Off: one pass, everything masked.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from shared.aligned.examples import Prepared
from shared.diffusion.noise import Draw, chunk_draw, token_draw
from shared.settings.config import NoiseConfig


@dataclass(frozen=True)
class Request:
    """One forward pass of an example: ids with masks, positions to read, the gold ids there."""

    ids: Int[np.ndarray, " length"]
    read: Int[np.ndarray, " read"]
    gold: Int[np.ndarray, " read"]


@dataclass(frozen=True)
class TeacherView:
    """The masked teacher positions (rising), the CompDemo part of each, and its active chunk.

    `in_a`: True in part A. For a shared tokenizer `chunk_of` numbers the positions themselves
    (every masked token is a chunk of its own), and `student` has the student's positions, which may
    be fewer than it has masked (`targets.positions`): what is not read is not masked.
    """

    ids: Int[np.ndarray, " length"]
    positions: Int[np.ndarray, " masked"]
    in_a: Bool[np.ndarray, " masked"]
    chunk_of: Int[np.ndarray, " masked"]
    student: Int[np.ndarray, " masked"] | None = None


def draw_for(example: Prepared, noise: NoiseConfig, draw: int) -> Draw:
    """A draw of an example: token masks for a shared tokenizer, chunk-consistent ones else."""
    maskable = example.maskable
    if example.shared:
        return token_draw(noise.seed, example.id, draw, maskable, noise.demo_ratio)
    spans, length = example.chunks[:, 2:], len(example.student_ids)
    return chunk_draw(noise.seed, example.id, draw, maskable, length, spans, noise.demo_ratio)


def teacher_view(example: Prepared, draw: Draw) -> TeacherView:
    """Where the teacher's sequence is masked under `draw`."""
    ids = example.student_ids if example.teacher_ids is None else example.teacher_ids
    if example.shared:
        which, places = example.asked(draw.masked)
        chunk_of = np.arange(which.size)
        return TeacherView(ids, places, draw.split[which], chunk_of, draw.masked[which])
    # Every position of every active chunk's teacher span, one chunk after the other.
    spans = example.chunks[draw.chunks, :2]
    lengths = spans[:, 1] - spans[:, 0]
    chunk_of = np.repeat(np.arange(len(spans)), lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = (spans[chunk_of, 0] + offsets).astype(np.int32)
    return TeacherView(ids, positions, draw.split[chunk_of], chunk_of)


def passes(
    view: TeacherView, mask_id: int, comp_demo: bool
) -> list[tuple[Request, Int[np.ndarray, " _"]]]:
    """The forward passes that read every masked position once, each with the indices it reads.

    Indices are into `view`. A pass with nothing to read is left out.
    """
    parts = [~view.in_a, view.in_a] if comp_demo else [np.ones(view.positions.size, bool)]
    result = []
    for part in parts:
        rows = np.flatnonzero(part)
        if rows.size:
            # What is read is masked; the other part is revealed.
            read = view.positions[rows]
            ids = view.ids.copy()
            ids[read] = mask_id
            result.append((Request(ids, read, view.ids[read]), rows))
    return result
