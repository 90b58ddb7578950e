"""Triton's interpreter stands in for a GPU: it must be chosen before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# A fixed seed keeps the suite the same from run to run; a deadline would measure the load of the machine.
settings.register_profile(
    "minikv", deadline=None, derandomize=True, database=None, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("minikv")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The same random numbers, and no graphs of the tests before."""
    monkeypatch.delenv("MINIKV_DISABLE", raising=False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_device(request):
    """The test runs once with everything that it makes on the CPU, and once on a GPU."""
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield torch.device(request.param)
    torch.set_default_device(None)
