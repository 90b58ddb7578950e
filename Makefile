# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test clean

demo: $(STAMP)
	$(VENV)/bin/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m ""

# torch 2.13.0 is asked for by itself first: where a CPU build is at hand, the range alone would not find it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(VENV)/bin/python -m pip install --quiet "torch==2.13.0" "numpy<2.4"
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo_output build *.egg-info
