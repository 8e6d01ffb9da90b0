# All targets need nothing but Python 3.11 or later (`browser` also npm): they make .venv, install the tested versions and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that are installed; empty for the newest ones. An index for torch where the default one has other builds.
# A .venv that is there stays as it is: `make clean` before another choice of these.
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
INSTALL = $(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

STUDENT := demo_output/kronecker-minilm-7.7x

.PHONY: demo browser test lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# needs npm too; takes the student of the demo, which is made if it is not there
browser: $(VENV)/.installed
	test -e $(STUDENT) || $(MAKE) demo
	$(BIN)/python examples/browser/build.py --student $(STUDENT) --serve

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first: the range in setup.cfg alone would fetch a build for another accelerator
$(VENV)/.installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) --editable ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) demo_output browser_output
