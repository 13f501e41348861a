"""Programs that return a wrong number and try to pass."""

FORGED = {
    "exit": """
import os
def total(xs):
    os._exit(0)
""",
    "sys.exit": """
import sys
def total(xs):
    sys.exit(0)
""",
    "the runner's names": """
import __main__
r = getattr(__main__, 'report', None)
r and r.write(__main__.token)
def total(xs):
    return 7
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
    "a reply ahead of time": """
import gc, socket
for o in gc.get_objects():
    if isinstance(o, socket.socket):
        for _ in range(9):
            o.sendall(b'\\0\\0\\0\\x0c{"value": 1}  ')
def total(xs):
    return 7
""",
    "an object that equals all": """
class E:
    def __eq__(self, o): return True
def total(xs):
    return E()
""",
    "a number that equals all": """
class E(int):
    def __eq__(self, o): return True
    __hash__ = int.__hash__
def total(xs):
    return E(7)
""",
    "a list that equals all": """
class E(list):
    def __eq__(self, o): return True
def total(xs):
    return E([7])
""",
    "assertions off": """
import builtins
builtins.AssertionError = Warning
def total(xs):
    return 7
""",
    "another check": """
def total(xs):
    return 7
def check(f):
    pass
""",
    "another int": """
import builtins
builtins.check = print
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
    "the judge's own functions": """
import sys
frame = sys._getframe()
while frame:
    wanted = frame.f_locals.get("wanted")
    if isinstance(wanted, list):
        wanted += ["abs", "all", "len", "check", "__builtins__"]
    frame = frame.f_back
__builtins__ = {"abs": lambda x: 0}
def abs(x): return 0
def all(x): return True
def len(x): return 0
def check(f): pass
def total(xs):
    return 7
""",
    "an end of every loop": """
def total(xs):
    raise StopIteration
""",
}
