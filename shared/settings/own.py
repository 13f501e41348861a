"""Objectives of your own: `type = "module:Class"` names a class of a module in the working
directory. It is imported for settings that you state (`build(…, imports=True)`), never for those
that a run or a cache has recorded.
"""

import sys
from dataclasses import is_dataclass, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from shared.system.files import TideError


def own_class(name: str, base: type) -> type:
    """The frozen dataclass that `module:Class` names, with the fields of `base` and its `type`."""
    module, _, attribute = name.partition(":")
    # 1. The module, from here alone.
    here, parts = Path.cwd(), module.split(".")
    folders = [here.joinpath(*parts[:i]) for i in range(len(parts) + 1)]
    marks = ("run.json", "manifest.json")
    if any((folder / mark).exists() for folder in folders for mark in marks):
        what = f"{name} lies in the folder of a run or a cache, from which nothing is imported"
        raise TideError(what, fix="put the module beside your recipe, and start tide there")
    places = (here / f"{parts[0]}.py", here / parts[0] / "__init__.py")
    if not all(map(str.isidentifier, parts)) or not any(place.is_file() for place in places):
        what = f"{name} names the module {parts[0]}, which is not in {here}"
        raise TideError(what, fix="start tide in the folder of the module")
    if str(here) not in sys.path:
        sys.path.append(str(here))
    found: Any = import_module(module)
    if here not in Path(found.__file__ or "").parents:
        what = f"the module {module} of {name} is {found.__file__}, not the one in {here}"
        raise TideError(what, fix="give yours a name that no library has")
    # 2. Its class.
    kind: Any = getattr(found, attribute, None)
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    needs, loss = getattr(kind, "needs", None), getattr(kind, "loss", None)
    known: Any = {"__pydantic_config__": base.__pydantic_config__}  # type: ignore[attr-defined]
    fields: Any = [("type", str, name)]
    bases: Any = (kind, base)
    try:
        if not (frozen and needs in ("topk", "chunks") and callable(loss)):
            raise TypeError(f"it is {kind!r}, and needs is {needs!r}")
        return make_dataclass(attribute, fields, bases=bases, namespace=known, frozen=True)
    except TypeError as error:
        expected = "a frozen dataclass whose fields have defaults, with needs = 'topk' or 'chunks'"
        raise TideError(
            f"{name} is no objective: {error}",
            expected=f"{expected}, and a method loss(self, student, teacher)",
        ) from error
