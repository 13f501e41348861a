"""Real text that every machine has: the functions of Python's standard library, as chat examples.

Nothing of the library is copied into this project: the sources are parsed where they lie. An
example asks for a function by name, module and docstring; the answer is its source without the
docstring. Functions without a docstring count too (the request then has only the names), so that
the corpus is large enough to train on.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HELDOUT_ONE_IN = 16


@dataclass(frozen=True)
class StdlibFunction:
    """One function: `name` is `module:qualified.name`, `source` has no docstring."""

    name: str
    docstring: str
    source: str

    def messages(self) -> list[dict[str, str]]:
        """A request with module, name and docstring; the source as the answer."""
        module, _, qualified = self.name.partition(":")
        request = f"Write `{qualified}` of the Python module `{module}`."
        if self.docstring:
            request += f"\n\n{self.docstring}"
        return [{"role": "user", "content": request}, {"role": "assistant", "content": self.source}]


def corpus_origin() -> str:
    """Which standard library is read, for model cards and reports."""
    return f"{platform.python_implementation()} {platform.python_version()} standard library"


def iter_stdlib_functions(
    split: Literal["train", "heldout", "all"] = "all",
) -> Iterator[StdlibFunction]:
    """The functions of the running Python's library in a fixed order, each distinct source once.

    About one in sixteen is held out, by a hash of its source. Files that do not parse, which the
    library ships on purpose, have no part.
    """
    root = Path(sysconfig.get_path("stdlib"))
    # By a hash of the path, so that the first functions come from all over the library.
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).hexdigest())
    seen: set[bytes] = set()
    for path in paths:
        if _SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            source = (root / path).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for function in _functions_in(tree, f"{module}:", source.splitlines()):
            digest = hashlib.sha256(function.source.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            heldout = digest[0] % _HELDOUT_ONE_IN == 0
            if split == "all" or heldout == (split == "heldout"):
                yield function


def _functions_in(node: ast.AST, prefix: str, lines: list[str]) -> Iterator[StdlibFunction]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            source = _source_without_docstring(child, lines)
            if source is not None:
                docstring = ast.get_docstring(child) or ""
                yield StdlibFunction(f"{prefix}{child.name}", docstring, source)
            yield from _functions_in(child, f"{prefix}{child.name}.", lines)
        elif isinstance(child, ast.ClassDef):
            yield from _functions_in(child, f"{prefix}{child.name}.", lines)
        elif not isinstance(child, ast.expr):  # an expression holds no function that has a name
            yield from _functions_in(child, prefix, lines)


def _source_without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's own lines, dedented; None where nothing but the docstring is there."""
    first, last = node.lineno - 1, node.end_lineno
    kept = lines[first:last]
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        if len(node.body) == 1 or doc.end_lineno is None or doc.lineno == node.lineno:
            return None
        kept = lines[first : doc.lineno - 1] + lines[doc.end_lineno : last]
    text = textwrap.dedent("\n".join(kept)).strip("\n")
    return text if text.replace("\n", "").replace("\t", "").isprintable() else None
