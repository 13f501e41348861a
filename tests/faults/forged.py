"""Programs that return a wrong number and try to pass."""

FORGED = {
    "exit": """
import os
def total(xs):
    os._exit(0)
""",
    "frames": """
import sys
f = sys._getframe()
while f:
    f.f_globals.update(passed=True, token="x", verdict="passed")
    f = f.f_back
def total(xs):
    return 7
""",
    "every descriptor": """
import os
for n in range(3, 64):
    try:
        os.write(n, b'"passed"')
    except OSError:
        pass
os._exit(0)
""",
    "an object that equals all": """
class E:
    def __eq__(self, o): return True
def total(xs):
    return E()
""",
    "assertions off": """
import builtins
builtins.AssertionError = Warning
def total(xs):
    return 7
""",
    "a hook at the end": """
import atexit, os
atexit.register(os._exit, 0)
def total(xs):
    return 7
""",
    "the judge's memory": """
import os
try:
    open(f'/proc/{os.getppid()}/mem', 'r+b').close()
    os._exit(0)
except OSError:
    pass
def total(xs):
    return 7
""",
}
