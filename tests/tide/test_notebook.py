"""docs/notebook.md as a notebook: its cells, one after the other, in one namespace."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "notebook.md"


def cells() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings(
    "ignore"
)  # a notebook has no filter; what warns there is a matter of other tests
def test_the_cells_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells():
        exec(compile(cell, str(PAGE), "exec"), names)
    cache, student = names["cache"], names["student"]
    assert (cache.teacher, cache.examples, cache.draws) == ("tiny-cross", 48, 2)
    assert names["distilled"].metrics["eval_heldout_nll"] > 0
    assert [loss for _, loss in names["curve"]] and (tmp_path / "runs" / "plain" / "model").is_dir()
    likely = student.log_likelihoods("def close(self):\n    return ", ["True", "banana"])
    assert likely[0] > likely[1]
    said = capsys.readouterr().out
    assert "48 examples are taken" in said and "⟦" in said
    assert "reverse_calm" in said[said.rindex("runs/distilled") :]  # what would work instead
