"""Lets `python -m g2l_core` (and so `torchrun -m g2l_core`) run the command line.

Python looks into the working folder first, where a user may well have a `pipeline.py`. So the folder that this package
lies in comes before it here; `python -m pipeline.cli` cannot do that.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("pipeline.cli", run_name="__main__", alter_sys=True)
