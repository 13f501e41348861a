"""`make conformance GOLDEN=DIR ARGS="--only losses|masks|alignment|models|sampler|step"`."""

import argparse
import sys
from pathlib import Path

from tests.conformance import run_conformance

parser = argparse.ArgumentParser(prog="python -m tests.conformance")
parser.add_argument("folder", type=Path)
parser.add_argument("--only", choices=["losses", "masks", "alignment", "models", "sampler", "step"])
arguments = parser.parse_args()
sys.exit(0 if run_conformance(arguments.folder, arguments.only) else 1)
