"""`benchmarks/kernel_times.py` runs, on the CPU, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs in Triton's interpreter, for machines without a GPU")
def test_dry_run(tmp_path):
    written, drawn = tmp_path / "kernels.json", tmp_path / "kernels.png"
    command = [sys.executable, "benchmarks/kernel_times.py", "--dry", "--json", str(written), "--plot", str(drawn)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(written.read_text())
    sections = {"bandwidth", "decode", "formats", "prefill", "compress", "flush", "linear"}
    assert {row["section"] for row in result["rows"]} >= sections
    assert result["checks"] and all(row["ok"] for row in result["checks"]) and not result["skipped"]
    assert drawn.stat().st_size > 0


def test_kernels_without_the_package():
    """On a bare machine: no installed package, no torchao."""
    code = "import _path, sys; from minikv_compile.kernels import attention; assert 'torchao' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
