from pathlib import Path

import pytest
from rich.console import Console

from pipelines.speed import training, use
from shared.settings.config import StudentConfig
from student_train.using.student import load_for_use

SMALL = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64)


def test_quality_is_that_of_the_text() -> None:
    """The embedded teacher likes true text better than the same tokens in another order."""
    student = load_for_use(str(Path("teacher_cache/teachers/tiny").resolve()), "cpu")
    blocks = [(prompt, answer[: use.BLOCK]) for prompt, answer in use.held_out(student, 6)]
    blocks = [(prompt, block) for prompt, block in blocks if len(block) == use.BLOCK]
    true, distinct = use.judge(student, blocks)
    shuffled, same = use.judge(student, [(prompt, block[::-1]) for prompt, block in blocks])
    assert true < shuffled - 1
    assert distinct == same < 1


@pytest.mark.slow
def test_every_table_is_measured() -> None:
    tables = [training.bench_stages(16), training.bench_head(4096), training.bench_loader((600,))]
    for table in (*tables, use.bench_use(SMALL, 2)):
        console = Console(record=True, width=200)
        console.print(table)
        assert console.export_text().count("│") > 4
