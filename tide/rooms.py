"""The library's other packages, whatever else of their names lies in the working directory.

Imported once, they are found by all that comes after. Where something would hide them, this
library's own folder goes to the front of the path, for processes that are started later too.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_ROOMS = ("shared", "teacher_cache", "student_train", "pipelines")

specs = {room: find_spec(room) for room in _ROOMS}
places = {room: str(_ROOT / room / "__init__.py") for room in _ROOMS}
hidden = [room for room, spec in specs.items() if spec is None or spec.origin != places[room]]
if loaded := [room for room in hidden if room in sys.modules]:
    raise ImportError(
        f"tide has a package {loaded[0]}, and {sys.modules[loaded[0]]} was imported before it: "
        "import tide first, or give yours another name"
    )
if hidden:
    sys.path.insert(0, str(_ROOT))
    for room in _ROOMS:
        import_module(room)
