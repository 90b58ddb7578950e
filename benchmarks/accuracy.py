"""Accuracy of the shipped decoder, as README reports it: `minikv eval` on its model, with its options.

    python benchmarks/accuracy.py --prompts 200 --batch 25 --inner eager --json benchmarks/results/accuracy.json
"""

import sys
from pathlib import Path

from minikv_compile.cli import app

MODEL = Path(__file__).parent.parent / "examples" / "tiny_decoder" / "model"
TASKS = ["--tasks", "single,multikey,tracking", "--lengths", "4096,8192", "--places", "inside"]

if __name__ == "__main__":
    app(["eval", "--model", str(MODEL), *TASKS, *sys.argv[1:]])
