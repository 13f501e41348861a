"""The library, for notebooks and scripts: what the command `tide` does, as four functions.

    import tide

    data = tide.prepare("tiny-cross")
    cache = tide.cache("tiny-cross", out="caches/mine")
    run = tide.train(cache, out="runs/mine", epochs=2)
    print(run.student().answer("Write `f`."))

Settings are those of a recipe (docs/settings.md), by name and nested as there:
`noise={"draws": 2}`. What is finished is kept: called again, each goes on where it stopped. What
cannot work raises `TideError`, which says how to mend it.
"""

from shared.system.errors import TideError
from tide.stages import Cache, Data, Run, Student, cache, load_student, prepare, train

__all__ = ["Cache", "Data", "Run", "Student", "TideError", "cache", "load_student", "prepare",
           "train"]  # fmt: skip
