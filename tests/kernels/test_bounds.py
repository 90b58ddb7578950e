"""Each kernel, in Triton's interpreter, touches nothing but the allocations of its arguments: the launches that
`benchmarks/sanitize.py` has compute-sanitizer watch on a GPU."""

import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sanitize  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer watches there")


class Watch:
    """Addresses that a launch may touch, and how many it did."""

    def __init__(self, monkeypatch, by_table=False):
        """`by_table`: addresses come in a table, too, so that every tensor there is counts as an argument."""
        self.starts, self.ends, self.touched = None, None, 0
        arguments = interpreter.GridExecutor._init_args_hst
        load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{what}") for what in ("load", "store"))

        def watched_arguments(executor, args, kwargs):
            found = arguments(executor, args, kwargs)
            others = [x for x in gc.get_objects() if type(x) is torch.Tensor] if by_table else []
            self.allow([*found[0], *found[1].values(), *others])
            return found

        def watched_load(builder, pointers, mask, *rest, **named):
            self.check(pointers, mask)
            return load(builder, pointers, mask, *rest, **named)

        def watched_store(builder, pointers, value, mask, *rest):
            self.check(pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", watched_arguments)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched_load)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", watched_store)

    def allow(self, arguments):
        tensors = [getattr(x, "base", x) if not isinstance(x, torch.Tensor) else x for x in arguments]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if hasattr(x, "untyped_storage")}
        self.starts = numpy.array(sorted(storages), dtype=numpy.uint64)
        self.ends = self.starts + numpy.array([storages[int(start)] for start in self.starts], dtype=numpy.uint64)

    def check(self, pointers, mask):
        mask = mask if isinstance(mask, numpy.ndarray) else mask.data  # of a descriptor, or of a call
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        first = numpy.broadcast_to(pointers.data, mask.shape)[mask].astype(numpy.uint64)
        at = numpy.searchsorted(self.starts, first, side="right") - 1
        inside = (at >= 0) & (first + numpy.uint64(size) <= self.ends[at])
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses are outside of all arguments"
        self.touched += inside.size


@pytest.mark.slow
@pytest.mark.parametrize("name", sanitize.LAUNCHES)
def test_touches_its_arguments_only(monkeypatch, name):
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    watch = Watch(monkeypatch, by_table=name == "flush")
    sanitize.LAUNCHES[name]()
    assert watch.touched > 1000


def test_the_watch_sees_an_address_past_the_end(monkeypatch):
    """So that it cannot be blind."""
    x = torch.rand(2, 5000)
    watch = Watch(monkeypatch)
    allow = watch.allow

    def short(arguments):
        allow(arguments)
        watch.ends -= numpy.uint64(4)

    watch.allow = short
    with pytest.raises(InterpreterError, match="outside of all arguments"):
        sanitize.highest_triton(x, 100)


@pytest.mark.parametrize("waits", [True, False])
def test_a_checker_that_takes_too_long_is_ended_with_what_it_began(waits):
    """compute-sanitizer runs Python as its child, which holds the pipe open."""
    command, begun = ["sh", "-c", "echo begun; sleep 60 &" + " wait" * waits], time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert sanitize.output_of(run, 1.0) == "begun\n\nnot done in time"
    assert run.returncode < 0 or not waits
    assert time.monotonic() - begun < 30
