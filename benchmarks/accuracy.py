"""Accuracy of the shipped decoder, ours and others' methods on the same prompts: `minikv eval` on its model.

    python benchmarks/accuracy.py --prompts 200 --batch 25 --json benchmarks/results/accuracy.json
    python benchmarks/accuracy.py --prompts 200 --batch 25 --seed 3000000 --json benchmarks/results/accuracy_tuned.json

The seeds from 3,000,000 on are those that presets were chosen on; those of the default, from 1,000,000 on, were not looked
at before. kvpress, optimum-quanto and HQQ: pip install '.[benchmark]' and pip install --no-deps kvpress.
"""

import sys
from pathlib import Path

from minikv_compile.cli import app
from minikv_compile.studies import STUDIES

MODEL = Path(__file__).parent.parent / "examples" / "tiny_decoder" / "model"
STUDY = STUDIES["pareto"]
OPTIONS = [
    "--tasks", ",".join(STUDY.tasks), "--lengths", ",".join(map(str, STUDY.lengths)), "--methods", ",".join(STUDY.methods),
    "--inner", "eager", "--feed",
]  # fmt: skip

if __name__ == "__main__":
    app(["eval", "--model", str(MODEL), *OPTIONS, *sys.argv[1:]])
