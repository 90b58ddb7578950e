"""What every result says of where it comes from."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance(device: torch.device | str) -> dict:
    """Date, command, device and versions of this run."""
    device = torch.device(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "torchao"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": _command(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions,
    }


def _command(argv: list[str]) -> str:
    script = Path(argv[0])
    if script.suffix != ".py" or script.parts[-2:] == ("minikv_compile", "cli.py"):
        return shlex.join(["minikv" if script.suffix == ".py" else script.name, *argv[1:]])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return "python " + shlex.join([str(script), *argv[1:]])
