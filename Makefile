# `make` prints this list.
#
# The virtual environment holds exactly what requirements*.txt lock, checked by hash.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile
# Many tests measure times and memory: one that fails beside the others is told of, and tried once more by itself.
AGAIN := $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

PROFILES := tests/test_pprof_go.py tests/test_pprof_windows.py

.DEFAULT_GOAL := help
.PHONY: help demo test long slow fuzz check format bench lock clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.runtime: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gproxyd needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Making the virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements-test.txt
	@echo "Adding what the tests need ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-test.txt
	@touch $@

demo: $(VENV)/.runtime ## serve an embedded scripted vendor on 127.0.0.1:8787 and print curl lines for it
	@exec $(BIN)/gproxyd demo

test: $(VENV)/.test ## lint, types, and the tests
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(PYTEST) -m "not long" $(TESTS) || $(AGAIN)

long: $(VENV)/.test ## hostile peers, faults and load at length
	@$(PYTEST) -m long $(PROFILES:%=--ignore=%) || $(AGAIN)

slow: $(VENV)/.test ## what needs a quiet machine, or builds something: profiles, and the real `go tool pprof` over them
	@$(PYTEST) $(PROFILES)

fuzz: $(VENV)/.test ## random requests for FUZZ_ROUNDS rounds (default 20000) from FUZZ_SEED (default: another every time)
	@FUZZ_ROUNDS=$${FUZZ_ROUNDS:-20000} FUZZ_SEED=$${FUZZ_SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')} \
	  $(BIN)/python -m pytest -q -s tests/test_fuzz_requests.py

check: format test long ## format, then everything that is tested

format: $(VENV)/.test ## format the code and mend what the linter can
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

bench: $(VENV)/.test ## measure beside nginx and the usual aiohttp proxy (needs wrk; nginx if it is there)
	@$(BIN)/python -m tests.bench.run $(BENCH)

lock: $(VENV)/.test ## resolve and lock the newest dependencies (needs uv)
	uv pip compile setup.cfg --extra build --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements.txt
	uv pip compile setup.cfg --extra build --extra test --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-header --no-annotate --no-emit-index-url --constraint requirements.txt --output-file requirements-test.txt

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
