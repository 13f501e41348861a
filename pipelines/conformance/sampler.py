"""Greedy block decoding: keys `sample/stepsS-blockB-newN` of expected.safetensors, all prompts as one batch."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pipelines.conformance.result import Group, absent, load_tensors
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from student_train.model.student import student_architecture
from student_train.using.decoding import pad_left
from student_train.using.sampler import sample_steps
from student_train.using.settings import SampleConfig, Special

_SPECIAL = Special(mask=95, pad=93, eos=94)
"""As the reference was run; the checkpoint itself names the mask alone."""


def sampler_groups(folder: Path) -> list[Group]:
    """One group a setting; a case is one prompt, whose difference is the share of wrong tokens."""
    groups = []
    for path in sorted(folder.glob("*/expected.safetensors")):
        expected = load_tensors(path)
        keys = sorted(key for key in expected if key.startswith("sample/"))
        if not keys:
            continue
        checkpoint = open_checkpoint(str(path.parent))
        model = load_model(checkpoint, student_architecture(checkpoint), torch.float32).eval()
        prompts = [
            expected[key].tolist()
            for key in sorted(k for k in expected if re.fullmatch(r"prompt_\d+", k))
        ]
        for key in keys:
            steps, block, new = (int(x) for x in re.findall(r"\d+", key))
            config = SampleConfig(
                new_tokens=new, block=block, steps_per_block=max(1, steps * block // new)
            )
            *_, (tokens, _) = sample_steps(model, prompts, _SPECIAL, config)
            group = Group(f"{path.parent.name} {key.removeprefix('sample/')}")
            whole = torch.cat([pad_left(prompts, block, _SPECIAL.pad)[0], tokens], dim=1)
            for wrong in (whole != expected[key]).float().mean(dim=1).tolist():
                group.add(wrong, 0.0)
            groups.append(group)
    return groups or absent("samples")
