"""What every committed result says of where it comes from."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

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
        "command": "python " + shlex.join([sys.argv[0].removeprefix(sys.path[0] + "/"), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": versions,
    }
