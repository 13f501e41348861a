"""In a real notebook's kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_progress_is_the_notebooks_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / "kernel"))
    data = {"source": "stdlib:train", "limit": 8}
    code = f"import tide\ntide.prepare('tiny-shared', {data}, out='c')"
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(page, timeout=300, resources=where).execute()
    outputs = page.cells[0].outputs
    bars = [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    written = "".join(output.text for output in outputs if output.output_type == "stream")
    assert bars and "row/s" not in written, outputs
