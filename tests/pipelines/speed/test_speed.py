import itertools
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.speed import training, use
from shared.settings.config import StudentConfig
from shared.system.files import read_json
from student_train.using.student import load_for_use
from teacher_cache.teachers.registry import published_shape

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


def test_the_papers_models_are_measured_where_there_is_memory_for_them(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both architectures decode in blocks, or one token after another; their shapes are tiny."""
    mixture = read_json(golden / "llada2_moe/config.json") | {"max_position_embeddings": 256}
    small = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 96}
    student = (published_shape("qwen3-0.6b") or {}) | small
    shapes = {"llada2-mini": mixture, "qwen3-0.6b": student}
    monkeypatch.setattr(use, "published_shape", lambda name: shapes.get(name, too_large))
    too_large = published_shape("qwen3-8b")
    monkeypatch.setattr(use, "in_process", lambda job, *given: job(*given))
    monkeypatch.setattr(use, "get_max_memory", lambda: {"cpu": 2**30})
    mark = itertools.count(2**30, 2**20)  # this process may have held more before
    monkeypatch.setattr(use, "high_water", lambda: next(mark))
    table = use.bench_paper(tokens=32)
    seconds, stated = (list(table.columns[i].cells) for i in (5, 8))
    assert [float(str(cell)) >= 0 for cell in seconds if cell] == [True] * 3
    assert stated == ["1.0", "–", "", "5.2"]
