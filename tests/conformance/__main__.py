"""`make conformance GOLDEN=DIR ARGS="--only losses|masks|alignment|models|sampler|step"`."""

import argparse
import sys
from pathlib import Path

from tests.conformance import run_conformance

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("folder", type=Path)
    parts = ["losses", "masks", "alignment", "models", "sampler", "step"]
    parser.add_argument("--only", choices=parts)
    arguments = parser.parse_args()
    sys.exit(0 if run_conformance(arguments.folder, arguments.only) else 1)
