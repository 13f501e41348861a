"""`tide chat`: a conversation in the terminal, drawn as blocks settle."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipelines.terminal.text import printable
from student_train.using.load import LoadedStudent
from student_train.using.sampler import sample_steps, until_eos
from student_train.using.settings import SampleConfig

_MASK = "░"


def talk(
    student: LoadedStudent,
    config: SampleConfig,
    show_diffusion: bool,
    console: Console | None = None,
) -> None:
    """Read questions and answer them until there are no more."""
    console = console or Console()
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        answer = _answer(student, messages, config, show_diffusion, console)
        messages.append({"role": "assistant", "content": answer})


def _answer(
    student: LoadedStudent,
    messages: list[dict[str, str]],
    config: SampleConfig,
    show_diffusion: bool,
    console: Console,
) -> str:
    """The answer, drawn after every step, or after every block where the diffusion is not to be shown."""
    final: list[int] = []
    with Live(Text(), console=console, refresh_per_second=30) as live:
        for tokens, _ in sample_steps(
            student.model, [student.prompt(messages)], student.special, config
        ):
            row = tokens[0].tolist()
            settled = student.special.mask not in row
            final = row if settled else final
            if settled or show_diffusion:
                live.update(_draw(student, row), refresh=True)
    return student.text(until_eos(final, student.special.eos))


def _draw(student: LoadedStudent, row: list[int]) -> Text:
    """Text of a row; masked tokens as shaded cells."""
    text = Text()
    run: list[int] = []
    for token in [*row, student.special.eos]:
        if token in (student.special.mask, student.special.eos):
            text.append(printable(student.text(run)))
            run = []
        if token == student.special.mask:
            text.append(_MASK, style="dim")
        elif token == student.special.eos:
            break
        else:
            run.append(token)
    return text
