# `make bench` and `make test` work as the first command in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
READY = $(VENV)/.ready
RUN = $(VENV)/bin/python -m
INTERPRETED = $(addprefix tests/test_,values.py cells.py dropout.py recompute.py grid_simulator.py races.py bounds.py)

.PHONY: bench test lint smoke matrix clean

bench: $(READY)
	$(RUN) pytest bench --benchmark-only

# Natively on a CPU, or on a GPU; then a part in Triton's interpreter.
test: $(READY)
	$(RUN) pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 $(RUN) pytest -n auto --dist worksteal -m interpreted $(INTERPRETED)

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

# Values, races and machine code by each version of Triton that is supported, beside the environment's own; an hour.
TRITONS = 3.6.0 3.7.1 3.8.0 3.9.0
# The interpreter of 3.6 makes scalars of arrays, which NumPy 2.4 refuses.
WITH_3.6.0 = 'numpy<2.4'
IN = $(CURDIR)/.matrix/$*
MATRIX = PYTHONPATH=$(IN) LSTM_TRITON_CACHE=$(IN)/cache TRITON_CACHE_DIR=$(IN)/triton-cache

.PHONY: $(TRITONS:%=matrix-%)
matrix: $(TRITONS:%=matrix-%)

$(TRITONS:%=matrix-%): matrix-%: .matrix/%/.ready
	$(MATRIX) $(RUN) pytest -q tests/test_values.py tests/test_cooperative.py tests/test_machine_code.py
	$(MATRIX) TRITON_INTERPRET=1 $(RUN) pytest -q -m interpreted $(INTERPRETED)

.PRECIOUS: .matrix/%/.ready
.matrix/%/.ready: $(READY)
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --target .matrix/$* triton==$* $(WITH_$*)
	touch $@

clean:
	rm -rf $(VENV) .matrix build *.egg-info .pytest_cache .mypy_cache .ruff_cache
