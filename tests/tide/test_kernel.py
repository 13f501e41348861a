"""In a real notebook's kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_progress_is_the_notebooks_bar(tmp_path: Path) -> None:
    data = {"source": "stdlib:train", "limit": 8}
    code = f"import tide\ntide.prepare('tiny-shared', {data}, out='c')"
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(page, timeout=300, resources=where).execute()
    outputs = page.cells[0].outputs
    bars = [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert bars and not [output for output in outputs if output.output_type == "stream"], outputs
