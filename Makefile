# Two commands need nothing but python3 (3.11 or newer) and make: `make stars` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: stars test bench lint clean
.DEFAULT_GOAL := stars

# The environment is made anew when what it is made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("looplm needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# On every core, where pip compiles on one; what is no Python of this version fails, and is never imported.
	@$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true
	touch $@

stars: $(VENV)/.installed
	$(BIN)/python -m looplm sweep conf/stars_plus.yaml conf/fixed_depth.yaml --root runs/make_stars
	@echo "         after: . $(BIN)/activate"

# Three processes on two cores: many tests wait for another process.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks --json build/benchmarks.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist
