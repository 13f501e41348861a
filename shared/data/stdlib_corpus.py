"""Real text that every machine has: the functions of Python's standard library, as chat examples.

Nothing of the library is copied into this project: the sources are parsed where they lie. An example asks for a
function by name, module and docstring; the answer is its source without the docstring. Functions without a
docstring count too (the request then carries only the names), so that the corpus is large enough to train on.
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

Split = Literal["train", "heldout", "all"]

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
}
_HELDOUT_SHARE = 16  # one in sixteen


@dataclass(frozen=True)
class StdlibFunction:
    """One function: `name` is `module:qualified.name`, `docstring` may be empty, `source` has no docstring."""

    name: str
    docstring: str
    source: str

    @property
    def heldout(self) -> bool:
        """True for about one function in sixteen, by a hash of its source: equal sources fall on one side."""
        return hashlib.sha256(self.source.encode()).digest()[0] % _HELDOUT_SHARE == 0

    def messages(self) -> list[dict[str, str]]:
        """The chat form: a request with module, name and docstring; the source as the answer."""
        module, _, qualified = self.name.partition(":")
        request = f"Write `{qualified}` of the Python module `{module}`."
        if self.docstring:
            request += f"\n\n{self.docstring}"
        return [{"role": "user", "content": request}, {"role": "assistant", "content": self.source}]


def corpus_origin() -> str:
    """Which standard library is read, for model cards and reports."""
    return f"{platform.python_implementation()} {platform.python_version()} standard library"


def iter_stdlib_functions(
    split: Split = "all", root: Path | None = None
) -> Iterator[StdlibFunction]:
    """Yield the functions of the standard library in a fixed order, each distinct source once.

    `root` is the folder to read (default: the running Python's own library); files that do not parse are no
    part of the corpus (the library ships some on purpose).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[bytes] = set()
    for relative in sorted((p.relative_to(root) for p in root.rglob("*.py")), key=_scattered):
        if _SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            source = (root / relative).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for function in _functions_of(tree, source.splitlines(), module):
            digest = hashlib.sha256(function.source.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            if split == "all" or function.heldout == (split == "heldout"):
                yield function


def _scattered(path: Path) -> str:
    """Order by a hash of the path, so that the first functions come from all over the library."""
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _functions_of(tree: ast.Module, lines: list[str], module: str) -> Iterator[StdlibFunction]:
    def visit(node: ast.AST, prefix: str) -> Iterator[StdlibFunction]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                source = _source_without_docstring(child, lines)
                if source is not None:
                    yield StdlibFunction(
                        f"{module}:{prefix}{child.name}", ast.get_docstring(child) or "", source
                    )
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            elif not isinstance(child, ast.expr):  # an expression holds no function that has a name
                yield from visit(child, prefix)

    yield from visit(tree, "")


def _source_without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's own lines, dedented, docstring cut out; None where nothing but the docstring is there."""
    first, last = node.lineno - 1, node.end_lineno
    body = node.body
    if ast.get_docstring(node) is not None:
        doc = body[0]
        if len(body) == 1 or doc.end_lineno is None or doc.lineno == node.lineno:
            return None
        kept = lines[first : doc.lineno - 1] + lines[doc.end_lineno : last]
    else:
        kept = lines[first:last]
    text = textwrap.dedent("\n".join(kept)).strip("\n")
    return text if text.replace("\n", "").replace("\t", "").isprintable() else None
