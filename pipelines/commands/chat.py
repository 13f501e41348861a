"""`tide chat`: a conversation in the terminal, drawn as blocks settle."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipelines.terminal import printable
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, sample_steps, until_eos


def talk(
    student: LoadedStudent, config: SampleConfig, show_diffusion: bool, console: Console
) -> None:
    """Answer questions until there are no more. An answer is drawn after every block, or after
    every step where the diffusion is to be shown, with masked tokens as shaded cells.
    """
    special = student.special
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        final: list[int] = []
        with Live(Text(), console=console, refresh_per_second=30) as live:
            prompt = student.prompt(messages)
            for tokens, _ in sample_steps(student.model, [prompt], special, config):
                row = tokens[0].tolist()
                settled = special.mask not in row
                final = row if settled else final
                if not settled and not show_diffusion:
                    continue
                drawn, words = Text(), []
                for token in [*row, special.eos]:
                    if token not in (special.mask, special.eos):
                        words.append(token)
                        continue
                    drawn.append(printable(student.text(words)))
                    words = []
                    if token == special.eos:
                        break
                    drawn.append("░", style="dim")
                live.update(drawn, refresh=True)
        answer = student.text(until_eos(final, special.eos))
        messages.append({"role": "assistant", "content": answer})
