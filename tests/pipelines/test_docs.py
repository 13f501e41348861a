"""The documentation says what is: links, commands, facts about teachers, and settings."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import typer

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
        try:
            root.commands[name].make_context(name, arguments)
        except Exception as error:
            raise AssertionError(f"{page}: {line}") from error


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
    spec = importlib.util.spec_from_file_location("site", ROOT / "docs" / "_hooks" / "site.py")
    assert spec is not None and spec.loader is not None
    site: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    page = '<p>so <span class="arithmatex">\\(p &lt; \\log q\\)</span></p><div class="arithmatex">\\[x^2\\]</div>'  # noqa: E501
    text = site.on_page_content(page)
    assert "arithmatex" not in text and text.count("<math") == 2 and "<msup>" in text
    text = site.on_page_markdown((ROOT / "docs" / "settings.md").read_text())
    assert "<!--" not in text
    for kind in (kind for kinds in site.SECTIONS.values() for kind in kinds):
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in text, (kind, field.name)
    assert "`int, at least 1, at most 100`" in text and "an epoch trains on one" in text
