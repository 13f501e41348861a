"""Made-up rows of the eight benchmarks as on the hub, and what to answer to all."""

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

_TASKS = Path(lm_eval.tasks.__file__).parent
_CHOICES = ["one", "two", "three", "four"]
_FUNCTION = {
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(2) == 3",
}
_ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "What is 3 and 4?", "answer": "3+4=7\n#### 7"},
    "math": {"problem": "What?", "solution": "It is $\\boxed{7}$.", "level": "1", "type": "x"},
    "bbh": {"input": "Is it so?", "target": "True"},
    "mmlu-pro": {"question": "Which?", "options": _CHOICES, "answer": "B", "cot_content": ""},
    "hellaswag": {"activity_label": "Walking", "ctx": "A man", "endings": _CHOICES, "label": "1"},
    "mmlu": {"question": "Which?", "choices": _CHOICES, "answer": 1, "subject": "x"},
    "humaneval": {**_FUNCTION, "canonical_solution": "    return x + 1\n", "task_id": "0"},
    "mbpp": {"text": "Add one.", "test_list": ["assert f(2) == 3", "assert f(0) == 1", "f(1)"]},
}
RIGHT = {
    "gsm8k": "So it is 7.",
    "math": "So it is $\\boxed{7}$.",
    "bbh": "So the answer is True.",
    "mmlu-pro": "So the answer is (B).",
    "hellaswag": "B. of",
    "mmlu": " B.",
    "humaneval": "    return x + 1\n```\nDone.",
    "mbpp": "def f(x):\n    return x + 1\n```\nDone.",
}
_SUBSETS = {
    "math": ("minerva_math", "minerva_math_*.yaml", ["train", "test"]),
    "bbh": ("bbh/cot_fewshot", "[!_]*.yaml", ["test"]),
    "mmlu": ("mmlu/generative", "mmlu_*.yaml", ["test", "validation", "dev"]),
}


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's files without importing their functions."""


_Loader.add_constructor("!function", lambda *_: None)


def write(folder: Path, name: str) -> Path:
    """A file, or for data sets of many subsets a folder with the card that names them."""
    folder.mkdir(parents=True)
    if name in _SUBSETS:
        place, pattern, splits = _SUBSETS[name]
        files = sorted((_TASKS / place).glob(pattern))
        found = [yaml.load(file.read_text(), _Loader).get("dataset_name") for file in files]
        subsets = sorted({n for n in found if n})
        configs = [_subset(folder, subset, splits, _ROWS[name]) for subset in subsets]
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        return folder
    rows = [_ROWS[name]] * 3
    if name == "mmlu-pro":
        subjects = yaml.load((_TASKS / "mmlu_pro" / "_mmlu_pro.yaml").read_text(), _Loader)["task"]
        categories = [s.removeprefix("mmlu_pro_").replace("_", " ") for s in subjects]
        rows = [{**_ROWS[name], "category": category} for category in categories]
    _jsonl(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def _subset(folder: Path, subset: str, splits: list[str], row: dict[str, Any]) -> dict[str, Any]:
    for split in splits:
        _jsonl(folder / subset / f"{split}.jsonl", [row] * 3)
    files = [{"split": split, "path": f"{subset}/{split}.jsonl"} for split in splits]
    return {"config_name": subset, "data_files": files}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
