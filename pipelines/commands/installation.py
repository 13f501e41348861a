"""This installation: env, demo, bench, and the embedded models made again."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from pipelines.commands.app import INSTALLATION, app
from pipelines.terminal import say


@app.command(rich_help_panel=INSTALLATION)
def env() -> None:
    """Print what numbers and speed depend on: CPU, bfloat16, threads, GPU, versions."""
    from shared.system.hardware import describe_hardware

    facts = describe_hardware()
    for package in ("tide-distill", "transformers", "accelerate", "pyarrow", "vllm",
                    "lm-eval", "bitsandbytes", "ray"):  # fmt: skip
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            facts.append((package, "not installed"))
    say("\n".join(f"{name:<16}{value}" for name, value in facts))


@app.command(rich_help_panel=INSTALLATION)
def demo(
    out: Annotated[Path, Option(help="Of caches, runs and the report.")] = Path("runs/demo"),
    seeds: Annotated[int, Option(min=1, help="Seeds of every variant.")] = 3,
) -> None:
    """The whole pipeline on the embedded teacher: two caches, students with and without it."""
    from pipelines.experiments.demo import run_demo

    say(run_demo(out, seeds).read_text())


@app.command(rich_help_panel=INSTALLATION)
def bench(
    only: Annotated[str | None, Option(help="One table: stages, head, loader or use.")] = None,
) -> None:
    """Measure, side by side in one run, what the design claims about speed."""
    from pipelines.speed import run_bench

    run_bench(only)


@app.command(rich_help_panel=INSTALLATION)
def tiny_teacher(
    teacher: Annotated[Path, Option(help="Its folder.")] = Path("teacher_cache/teachers/tiny"),
    student_tokenizer: Annotated[Path, Option(help="The other student's tokenizer.")] = Path(
        "student_train/tiny_tokenizer"
    ),
) -> None:
    """Train the embedded teacher again (about an hour on 2 cores)."""
    from pipelines.tools.tiny_models import train_tiny_teacher

    train_tiny_teacher(teacher, student_tokenizer)


@app.command(rich_help_panel=INSTALLATION)
def tiny_student(
    out: Annotated[Path, Option(help="Their folder.")] = Path("student_train/tiny_students"),
    only: Annotated[Literal["cross", "shared"] | None, Option(help="One of the two.")] = None,
) -> None:
    """Pre-train the embedded students again, by cross-entropy alone."""
    from pipelines.tools.tiny_models import TOKENIZERS, train_tiny_student

    for name, tokenizer in TOKENIZERS.items():
        if only in (None, name):
            train_tiny_student(tokenizer, out / name)
