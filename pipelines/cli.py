"""The command `tide`: how it starts and ends, and its commands about this installation."""

import io
import logging
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NoReturn

from typer import Option

from pipelines.commands import caches, stages, students  # noqa: F401 - declared by being imported
from pipelines.commands.app import app, command, printable, say
from shared.system.files import TideError, disk_is_full
from shared.system.processes import end_with_parent, leave_in_order, stop_in_order

_INTERRUPTED = 130
INSTALLATION = "This installation"
_GO_ON = {"prepare", "cache", "train", "ablate", "eval", "demo", "merge", "prune", "push", "pull"}
_PACKAGES = ("tide-distill", "transformers", "accelerate", "pyarrow", "vllm", "lm-eval",
             "bitsandbytes", "ray")  # fmt: skip


@command(INSTALLATION)
def env() -> None:
    """Print what numbers and speed depend on: CPU, bfloat16, threads, GPU, versions."""
    from shared.system.hardware import describe_hardware

    facts = describe_hardware()
    for package in _PACKAGES:
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            facts.append((package, "not installed"))
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") == "1"  # as the engine sets it
    facts.append(("vllm's runner", "V2, which is not tested" if v2 else "V1"))
    say("\n".join(f"{name:<16}{value}" for name, value in facts))


@command(INSTALLATION)
def demo(
    out: Annotated[Path | None, Option(help="Default: runs/demo, or runs/curve.")] = None,
    seeds: Annotated[
        int | None, Option(min=1, help="Of every variant; default: 3, 5 for the curve.")
    ] = None,
    full: Annotated[bool, Option("--full", help="The curve over 64 to 1,024 functions.")] = False,
) -> None:
    """The whole pipeline on the embedded teacher: caches, students with and without it."""
    from pipelines.experiments.demo import run_demo

    out = out or Path("runs") / ("curve" if full else "demo")
    say(run_demo(out, seeds, full).read_text())


@command(INSTALLATION)
def bench(
    only: Annotated[str | None, Option(help="One table: stages, head, loader or use.")] = None,
    paper: Annotated[bool, Option("--paper", help="Of use: the paper's models.")] = False,
) -> None:
    """Measure, side by side in one run, what the design claims about speed."""
    from pipelines.speed import run_bench

    run_bench(only, paper)


class BesideBars(logging.Handler):
    """Log records on stderr, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(printable(self.format(record)), file=sys.stderr)


def main() -> NoReturn:
    """Entry point. What a user can mend ends in a message and exit code 2, Ctrl-C in 130, SIGTERM
    in 143.
    """
    # 1. streams: what an encoding lacks becomes a question mark
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # 2. records of this project from INFO on, of libraries from WARNING on, with time and rank
    handler = BesideBars()
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s{rank} %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("shared", "teacher_cache", "student_train", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nothing here uses
    warnings.formatwarning = lambda message, *_, **__: f"tide: warning: {printable(str(message))}\n"
    # 3. signals, then the command
    stop_in_order()
    end_with_parent()
    try:
        for argument in sys.argv[1:]:
            if os.fsencode(argument).decode(errors="replace") != argument:
                raise TideError(f"the argument {os.fsencode(argument)!r} is not UTF-8")
        app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            raise
        kept = "; what is finished is kept, the same command goes on from there"
        print(f"\ntide: stopped{kept if sys.argv[1] in _GO_ON else ''}", file=sys.stderr)
        sys.exit(leave_in_order())
    except Exception as error:
        text = str(error)
        if disk_is_full(error):
            fix = "free some space and run the same command again; what is finished is kept"
            text = f"the disk is full: {error}\n  fix: {fix}"
        elif type(error).__name__ == "OutOfMemoryError":  # torch's
            text += "\n  fix: `tide plan --gpu NAME` says what fits; close what else runs there"
        elif not isinstance(error, TideError | OSError):  # OSError: a folder not to be written, …
            raise
        print(f"tide: error: {printable(text)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
