# The two commands of a newcomer: `make audit` and `make test`. All set-up is theirs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
OUT ?= audits/digits

.PHONY: audit test check bench reproduce clean

audit: $(CORE)
	$(BIN)/turncoat audit --out $(OUT)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.federation
	$(BIN)/python -m benchmarks.flower
	-$(BIN)/pip install --quiet --no-deps byzfl==0.0.11
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.private

reproduce: $(READY)
	$(BIN)/python -m papers

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(READY): $(CORE)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
