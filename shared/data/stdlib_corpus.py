"""Real text that every machine has: the functions of Python's standard library, as chat examples.

The sources are parsed where they lie. An example asks for a function by name, module and, where it
has one, docstring; the answer is its source without the docstring.
"""

import ast
import hashlib
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HELDOUT_ONE_IN = 16
Function = ast.FunctionDef | ast.AsyncFunctionDef


def corpus_origin() -> str:
    """Which standard library is read, for model cards and reports."""
    return f"{platform.python_implementation()} {platform.python_version()} standard library"


def iter_stdlib_functions(
    split: Literal["train", "heldout", "all"] = "all",
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The functions of the running Python's library in a fixed order, each distinct source once:
    `module:qualified.name`, and the chat.

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
            text = (root / path).read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, node in _functions_in(tree, ""):
            source = _source_without_docstring(node, text.splitlines())
            digest = hashlib.sha256((source or "").encode()).digest()
            if source is None or digest in seen:
                continue
            seen.add(digest)
            heldout = digest[0] % _HELDOUT_ONE_IN == 0
            if split == "all" or heldout == (split == "heldout"):
                docstring = ast.get_docstring(node)
                request = f"Write `{name}` of the Python module `{module}`."
                request += f"\n\n{docstring}" if docstring else ""
                answer = {"role": "assistant", "content": source}
                yield f"{module}:{name}", [{"role": "user", "content": request}, answer]


def _functions_in(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            if isinstance(child, Function):
                yield f"{prefix}{child.name}", child
            yield from _functions_in(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):  # an expression holds no function that has a name
            yield from _functions_in(child, prefix)


def _source_without_docstring(node: Function, lines: list[str]) -> str | None:
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
