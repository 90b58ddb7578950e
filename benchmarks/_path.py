"""The kernels of this checkout, without the package: import this module first.

Where the package is not installed (a bare GPU machine), `minikv_compile.kernels` is this checkout's `kernels/`, as
pyproject's package-dir says. `minikv_compile/__init__` is not run: it imports torchao, which kernels do not need.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MOVED = {f"minikv_compile.{name}": ROOT / name for name in ("kernels", "passes")}


class _Finder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        folder = MOVED[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if "minikv_compile" not in sys.modules:
    sys.meta_path.insert(0, _Finder)
    package = ModuleType("minikv_compile")
    package.__path__ = [str(ROOT / "minikv_compile")]
    sys.modules["minikv_compile"] = package
