"""The documentation says what is: links lead somewhere, commands exist, facts about teachers are the registry's."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pipelines.cli import app
from pipelines.evaluation.recipe import paper_benchmarks
from pipelines.evaluation.table import beside_the_paper
from pipelines.plan.show_teacher import describe_teacher
from pipelines.reports.report import to_markdown
from teacher_cache.teachers.registry import all_teachers

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "teacher_cache/teachers/tiny/README.md",
    *DOCS,
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            place, _, anchor = link.partition("#")
            target = page.parent / place if place else page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }, link


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return root.commands


def shell_lines(text: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [block for kind, block in fenced if kind in ("", "bash")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line for line in joined.splitlines() if ".venv/bin/tide " in line]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if ".venv/bin/tide " in p.read_text()], ids=lambda p: p.name
)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = commands()
    for line in shell_lines(page.read_text()):
        words = shlex.split(line[line.index(".venv/bin/tide ") :], comments=True)[1:]
        assert words[0] in known, line
        if words[0] in ("lm-eval", "teachers"):
            continue
        options = {o for p in known[words[0]].params for o in (*p.opts, *p.secondary_opts)}
        assert {w.partition("=")[0] for w in words[1:] if w.startswith("--")} <= options, line


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert (
        set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
        <= targets
    )


def test_every_teacher_has_a_page_and_its_facts_are_the_registrys() -> None:
    text = "".join(page.read_text() for page in DOCS if page.parent.name == "teachers")
    for name in all_teachers(None):
        assert f"`{name}`" in text or f"TEACHER={name}" in text, name
    for page in (p for p in DOCS if p.parent.name == "teachers" and p.name != "index.md"):
        name = "tiny-cross" if page.stem == "tiny" else page.stem
        lines = [
            line for line in describe_teacher(name, None).splitlines() if str(ROOT) not in line
        ]
        assert "\n".join(lines) in page.read_text(), page


def test_no_page_names_a_place_of_the_machine_that_it_was_written_on() -> None:
    for page in PAGES:
        assert str(ROOT) not in page.read_text(), page


def test_the_papers_table_and_tasks_are_the_recipes() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert to_markdown(beside_the_paper({}).drop("source")) in page
    for name, benchmark in paper_benchmarks().items():
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", page, re.MULTILINE)
        assert f"| {benchmark.shots} | {benchmark.new_tokens} / {benchmark.steps} |" in row


def test_pages_of_the_site_are_all_in_its_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(page.relative_to(ROOT / "docs").as_posix() in menu for page in DOCS)


def test_equations_become_mathml() -> None:
    spec = importlib.util.spec_from_file_location("mathml", ROOT / "docs" / "_hooks" / "mathml.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = '<p>so <span class="arithmatex">\\(p &lt; \\log q\\)</span></p><div class="arithmatex">\\[x^2\\]</div>'
    text = hook.on_page_content(page)
    assert "arithmatex" not in text
    assert text.count("<math") == 2 and 'display="block"' in text and "<msup>" in text
    assert "&#x0003C;" in text or "&lt;" in text
    assert "<mspace" in text


def test_the_page_of_settings_has_every_one_in_its_own_words() -> None:
    """What `shared.settings.config` declares is on the page, and no setting is without a type and a default."""
    spec = importlib.util.spec_from_file_location(
        "settings", ROOT / "docs" / "_hooks" / "settings.py"
    )
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((ROOT / "docs" / "settings.md").read_text())
    assert "<!--" not in page
    for kinds in hook.SECTIONS.values():
        for kind in kinds:
            for field in dataclasses.fields(kind):
                assert f"| `{field.name}` |" in page, (kind, field.name)
    assert "Draws of an example that a step trains on in one pass" in page


def test_error_messages_of_the_page_are_the_programs() -> None:
    """Every fixed part of every message that the page explains stands in the code, in one error."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    packages = ("shared", "teacher_cache", "student_train", "pipelines", "tide")
    texts = [path.read_text() for package in packages for path in (ROOT / package).rglob("*.py")]
    source = "\n".join(
        re.sub(r'"\s*\n\s*f?"', "", text) for text in texts
    )  # texts over several lines
    source = re.sub(r"\{[^{}\n]*(\{[^{}\n]*\}[^{}\n]*)*\}", "…", source)
    messages = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(messages) > 25
    for message in messages:
        parts = [re.escape(part) for part in re.split(r"…", message.strip())]
        assert re.search("[^\n]{0,200}?".join(parts), source), message
