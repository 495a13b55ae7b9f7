# `make bench` and `make test` work as the first command in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
READY = $(VENV)/.ready
RUN = $(VENV)/bin/python -m
INTERPRETED = $(addprefix tests/test_,values.py dropout.py recompute.py grid_simulator.py races.py)

.PHONY: bench test lint smoke clean

bench: $(READY)
	$(RUN) pytest bench --benchmark-only

# Natively on a CPU, or on a GPU; then a part in Triton's interpreter.
test: $(READY)
	$(RUN) pytest
	TRITON_INTERPRET=1 $(RUN) pytest -m interpreted $(INTERPRETED)

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

smoke: $(READY)
	$(RUN) pytest bench --benchmark-disable -q

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
