"""The documentation says what is: links, commands, facts about teachers, settings; what ships."""

import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluation.benchmarks import beside_the_paper, read_benchmarks
from pipelines.experiments.report import to_markdown
from pipelines.plan.plan import describe_teacher
from teacher_cache.teachers.registry import all_teachers

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
TINY = ROOT / "teacher_cache/teachers/tiny/README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", TINY, *DOCS]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith(("http://", "https://")):
                continue
            place, _, anchor = link.partition("#")
            target = page.parent / place if place else page
            assert target.exists(), (page, link)
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert not anchor or anchor in slugs, (page, link)
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(page.relative_to(ROOT / "docs").as_posix() in menu for page in DOCS)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


def shell_lines(page: Path) -> list[str]:
    """The `tide` commands of a page."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    blocks = [block for kind, block in fenced if kind in ("", "bash")]
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    return [line[line.index(".venv/bin/tide ") :] for line in lines if ".venv/bin/tide " in line]


def test_every_command_of_every_page_parses() -> None:
    root: Any = typer.main.get_command(app)
    commands = [(page, line) for page in PAGES for line in shell_lines(page)]
    assert len(commands) > 25
    for page, line in commands:
        words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)[1:]
        end = [i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")]
        name, *arguments = words[: end[0]] if end else words
        assert name in root.commands, (page, line)
        root.commands[name].make_context(name, arguments)


def test_every_command_that_a_sentence_names_exists() -> None:
    named = [(p, line) for p in PAGES for line in re.findall(r"`tide ([^`]+)`", p.read_text())]
    assert len(named) > 50
    for page, line in named:
        place: Any = typer.main.get_command(app)
        words = re.sub("[….]", "", line).split()
        while words and hasattr(place, "commands") and words[0][0] != "-":
            assert words[0] in place.commands, (page, line)
            place = place.commands[words.pop(0)]
        known = {"--help"}.union(*(option.opts + option.secondary_opts for option in place.params))
        assert {word for word in words if word[:2] == "--"} <= known, (page, line)


def test_facts_about_teachers_and_benchmarks_are_the_programs() -> None:
    text = "".join(page.read_text() for page in DOCS if page.parent.name == "teachers")
    for name in all_teachers(None):
        assert f"`{name}`" in text or f"TEACHER={name}" in text, name
    for page in (p for p in DOCS if p.parent.name == "teachers" and p.name != "index.md"):
        name = "tiny-cross" if page.stem == "tiny" else page.stem
        lines = describe_teacher(name, None).splitlines()
        here = [line for line in lines if str(ROOT) not in line]  # a path of this machine
        assert "\n".join(here) in page.read_text(), page
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    assert to_markdown(beside_the_paper({}).drop("source")) in benchmarks
    for name, benchmark in read_benchmarks().items():
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", benchmarks, re.MULTILINE)
        assert f"| {benchmark.shots} | {benchmark.new_tokens} / {benchmark.steps} |" in row


def test_the_site_s_equations_and_its_page_of_settings() -> None:
    site = runpy.run_path(str(ROOT / "docs" / "_hooks" / "site.py"))
    page = '<p>so <span class="arithmatex">\\(p &lt; \\log q\\)</span></p><div class="arithmatex">\\[x^2\\]</div>'  # noqa: E501
    text = site["on_page_content"](page)
    assert "arithmatex" not in text and text.count("<math") == 2 and "<msup>" in text
    text = (ROOT / "docs" / "settings.md").read_text()
    assert site["settings_page"](text) == text  # python docs/_hooks/site.py writes it
    assert "`int, at least 1, at most 100`" in text and "an epoch trains on one" in text
    for line in re.findall(r"^\|.*", text, re.MULTILINE):  # no | in code, which is shown as it is
        assert "|" not in "".join(re.findall("`[^`]*`", line)), line


def test_every_package_is_in_the_wheel() -> None:
    """Packages are listed one by one; one that is forgotten is missing once installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = ("shared", "teacher_cache", "student_train", "pipelines", "tide")
    packages = [path.parent for room in rooms for path in (ROOT / room).rglob("__init__.py")]
    assert set(listed) == {".".join(path.relative_to(ROOT).parts) for path in packages}


# Commands that are not run, and why.
NEEDS = {
    r"^(cache|prepare|train|verify|sample|chat|publish) .*(llada|dream|wedlm|sdar|OWNER/NAME --license apache-2.0$)": "weights and tokenizers of the hub",  # noqa: E501
    r"^eval .*--tasks (paper|gsm8k,humaneval|arc_easy|gsm8k --limit|mmlu)": "data sets of the hub",
    r"^lm-eval ": "data sets of the hub",
    r"^ablate |^(cache|train|fidelity) .*runs/frontier": "an hour: tests run small grids",
    r"^(cache|gradients) .*caches/half-": "minutes: tests/pipelines/plan has smaller caches",
    r"^bench ": "minutes: tests/pipelines/speed runs the tables smaller",
    r"^serve ": "until it is stopped: tests of publishing serve a student",
}


def run(line: str) -> None:
    """Run a line where a user of the README stands, here."""
    done = CliRunner().invoke(app, shlex.split(line)[1:], input="Write `f`.\n\n")
    assert done.exit_code == 0, (line, done.output[-3000:], done.exception)


@pytest.mark.slow
def test_the_commands_of_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. recipes, the demo's caches and runs, some runs more
    tide = ".venv/bin/tide"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    row = '{"ask": "What is 3 and 4?", "say": "7.", "question": "What is 3 and 4?", "answer": "#### 7"}\n'  # noqa: E501
    (tmp_path / "gsm8k.jsonl").write_text(row)
    for teacher, name in (("tiny-cross", "TIDE-Cross"), ("tiny-shared", "undistilled-shared")):
        cache = f"runs/demo/caches/{teacher}"
        small = "--set data.limit=24 --set noise.draws=2"
        run(f"{tide} cache --teacher {teacher} {small} --out {cache}")
        small = f"--set max_steps=2 --set heldout.limit=8 --out runs/demo/{name}-seed0"
        run(f"{tide} train --teacher {teacher} --cache {cache} {small}")
    for name, decay in (("NAME", 0.0), ("one", 0.0), ("other", 0.1)):
        shutil.copytree(tmp_path / "runs/demo/TIDE-Cross-seed0", tmp_path / "runs" / name)
        settings = tmp_path / "runs" / name / "run.json"
        text = settings.read_text().replace('"weight_decay": 0.0', f'"weight_decay": {decay}')
        settings.write_text(text)
    # 2. every line of every page, once, in their order
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    lines = [re.sub(r"\s+#.*$", "", line).strip() for page in pages for line in shell_lines(page)]
    for line in dict.fromkeys(lines):
        if any(re.search(pattern, line.removeprefix(f"{tide} ")) for pattern in NEEDS):
            continue
        if "runs/sums.jsonl" in line:  # the page makes it in the line before
            (tmp_path / "runs/sums.jsonl").write_text(row)
        run(line)
