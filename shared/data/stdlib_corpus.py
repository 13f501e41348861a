"""Real text that every machine has: the functions of Python's standard library, as chat examples.

The sources are parsed where they lie. An example asks for a function by name, module and, where it
has one, docstring; the answer is its source without the docstring.

`train`, `heldout`, `all`: about one function in sixteen is held out, by a hash of its source. The
top-level modules are cut in two, by a hash of the name: `half-a` has the functions of `train` of
one half. Of the other, `half-b` has those of `train` of some modules, shuffled (`half-b#1`, …:
otherwise), `half-b-tune` and `half-b-test` those of `heldout` of two other parts of the modules.
`packages`: the functions of the other packages that are installed.
"""

import ast
import hashlib
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HELDOUT_ONE_IN = 16
SPLITS = ("train", "heldout", "all", "half-a", "half-b", "half-b-tune", "half-b-test", "packages")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def corpus_origin() -> str:
    """Which standard library is read, for model cards and reports."""
    return f"{platform.python_implementation()} {platform.python_version()} standard library"


def iter_stdlib_functions(split: str = "all") -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The functions of a split in a fixed order: `module:qualified.name`, and the chat."""
    split, _, number = split.partition("#")
    chosen = (each for each in _functions(split == "packages") if split in each[2])
    if split == "half-b":
        chosen = sorted(chosen, key=lambda f: hashlib.sha256(f"{number}#{f[0]}".encode()).digest())
    for name, messages, _ in chosen:
        yield name, messages


def _functions(packages: bool) -> Iterator[tuple[str, list[dict[str, str]], set[str]]]:
    """Name, chat and splits of each function, each distinct source once. Files that do not parse,
    which the library ships on purpose, have no part.
    """
    root = Path(sysconfig.get_path("purelib" if packages else "stdlib"))
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
            docstring = ast.get_docstring(node)
            request = f"Write `{name}` of the Python module `{module}`."
            request += f"\n\n{docstring}" if docstring else ""
            messages = [
                {"role": "user", "content": request},
                {"role": "assistant", "content": source},
            ]
            heldout = digest[0] % _HELDOUT_ONE_IN == 0
            splits = {"packages"} if packages else _splits_of(module, heldout)
            yield f"{module}:{name}", messages, splits


def _splits_of(module: str, heldout: bool) -> set[str]:
    """The splits that a function of the library is in."""
    splits = {"all", "heldout" if heldout else "train"}
    half, part, *_ = hashlib.sha256(f"half{module.partition('.')[0]}".encode()).digest()
    if half % 2 == 0:
        return splits | (set() if heldout else {"half-a"})
    parts = {2: "half-b-tune", 3: "half-b-test"} if heldout else {0: "half-b", 1: "half-b"}
    return splits | {parts.get(part % 4, "all")}


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
