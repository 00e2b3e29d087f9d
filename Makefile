# `make` prints this list.
#
# The virtual environment holds exactly what requirements*.txt lock, checked by hash.

# What is tested and measured is what the service will run on, if virtual environments can be made of it.
SERVICE_PYTHON ?= /usr/bin/python3
PYTHON ?= $(shell $(SERVICE_PYTHON) -c 'import sys, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null \
  && echo $(SERVICE_PYTHON) || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# Half of what a test does is wait: one process more than there are processors.
BESIDE := --dist loadfile --numprocesses $(shell expr $$(nproc) + 1)
# Many tests measure times and memory: one that fails beside the others is told of, and tried by itself, twice at most.
ALONE := $(PYTEST) --last-failed --last-failed-no-failures none
AGAIN := ($(ALONE) || $(ALONE))

# Where `make install` puts things; DESTDIR goes before all of them. SERVICE_PYTHON must be one that the service can read.
prefix ?= /opt/gproxyd
bindir ?= /usr/bin
libdir ?= /usr/lib
datadir ?= /usr/share
sysconfdir ?= /etc
UNITS := gproxyd.service gproxyd@.service gproxyd.socket gproxyd@.socket gproxyd-admin.socket

QUIET := tests/test_pprof_go.py tests/test_pprof_windows.py tests/test_hard_cases_load.py

.DEFAULT_GOAL := help
.PHONY: help deb demo test test-systemd install install-venv install-files long slow soak fuzz check format bench lock clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@$(PYTEST) $(BESIDE) -m "not long and not systemd" $(TESTS) || $(AGAIN)

deb: $(VENV)/.test ## build a Debian package in dist/: the program in /opt/gproxyd, units, manual, completions
	@packaging/build-deb $(BIN) $(SERVICE_PYTHON) dist

long: $(VENV)/.test ## hostile peers, faults and load at length
	@$(PYTEST) $(BESIDE) -m "long and not systemd" $(QUIET:%=--ignore=%) || $(AGAIN)

test-systemd: $(VENV)/.test ## a real systemd, booted in namespaces: hand-offs and restarts under load (root; about 5 minutes)
	@$(PYTEST) -s tests/systemd || $(ALONE) -s tests/systemd

soak: $(VENV)/.test ## everyday chaos for SOAK_SECONDS (600): nothing that the process holds may grow
	@SOAK_SECONDS=$${SOAK_SECONDS:-600} $(PYTEST) -s tests/test_soak.py

slow: $(VENV)/.test ## what needs a quiet machine, or builds something: crowds at full size, profiles, `go tool pprof`
	@$(PYTEST) -s $(QUIET)

fuzz: $(VENV)/.test ## random requests for FUZZ_SECONDS (600) from FUZZ_SEED (default: another every time), both parsers
	@export FUZZ_SECONDS=$${FUZZ_SECONDS:-600} FUZZ_SEED=$${FUZZ_SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')} && \
	  echo "FUZZ_SEED=$$FUZZ_SEED FUZZ_SECONDS=$$FUZZ_SECONDS" && \
	  $(PYTEST) --dist loadfile --numprocesses 2 tests/test_fuzz_requests.py tests/test_fuzz_requests_python.py
	@WAYS_ROUNDS=5000 WAYS_SEED=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') FRAMING_CUTS=200 \
	  $(PYTEST) -s tests/test_hard_cases_wire.py tests/test_framing.py -k "both_ways or one_verdict"

check: format test long ## format, then everything that is tested

format: $(VENV)/.test ## format the code and mend what the linter can
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

bench: $(VENV)/.test ## measure beside nginx and the usual aiohttp proxy (with wrk, nginx and openssl where they are there)
	@$(BIN)/python -m tests.bench.run $(BENCH)

lock: $(VENV)/.test ## resolve and lock the newest dependencies (needs uv)
	uv pip compile setup.cfg --extra build --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements.txt
	uv pip compile setup.cfg --extra build --extra test --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-header --no-annotate --no-emit-index-url --constraint requirements.txt --output-file requirements-test.txt
	uv pip compile setup.cfg --extra otel --universal --python-version 3.11 --generate-hashes --upgrade --no-header \
	  --no-annotate --no-emit-index-url --constraint requirements-test.txt --output-file requirements-otel.txt

install: install-venv install-files ## install into prefix=/opt/gproxyd, with units and a configuration (DESTDIR=, prefix=)
	@echo "Now, as root: systemd-sysusers && systemd-tmpfiles --create gproxyd.conf && systemctl daemon-reload"
	@echo "              systemctl enable --now gproxyd.socket gproxyd-admin.socket gproxyd.service"

install-venv:
	@$(SERVICE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gproxyd needs Python 3.11 or newer: make install SERVICE_PYTHON=...")'
	@$(SERVICE_PYTHON) -m venv $(DESTDIR)$(prefix)
	@$(DESTDIR)$(prefix)/bin/python3 -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.txt
	@rm -rf build  # what an earlier build left would be installed, too
	@$(DESTDIR)$(prefix)/bin/python3 -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	@[ -z "$(DESTDIR)" ] || grep -rlIF "$(DESTDIR)$(prefix)" $(DESTDIR)$(prefix)/bin $(DESTDIR)$(prefix)/pyvenv.cfg | \
	  xargs -r sed -i 's|$(DESTDIR)$(prefix)|$(prefix)|g'
	@[ -z "$(DESTDIR)" ] || $(SERVICE_PYTHON) -m compileall -qf -s $(DESTDIR)$(prefix) -p $(prefix) $(DESTDIR)$(prefix)/lib

install-files: $(VENV)/.runtime
	@install -d $(DESTDIR)$(bindir) $(DESTDIR)$(libdir)/systemd/system $(DESTDIR)$(sysconfdir)/gproxyd/conf.d
	@for unit in $(UNITS); do \
	  sed 's|/opt/gproxyd|$(prefix)|g' systemd/$$unit >$(DESTDIR)$(libdir)/systemd/system/$$unit && \
	  chmod 644 $(DESTDIR)$(libdir)/systemd/system/$$unit || exit 1; done
	@install -D -m 644 systemd/sysusers.d/gproxyd.conf $(DESTDIR)$(libdir)/sysusers.d/gproxyd.conf
	@install -D -m 644 systemd/tmpfiles.d/gproxyd.conf $(DESTDIR)$(libdir)/tmpfiles.d/gproxyd.conf
	@[ -e $(DESTDIR)$(sysconfdir)/gproxyd/gproxyd.yaml ] || \
	  install -m 644 etc/gproxyd.yaml $(DESTDIR)$(sysconfdir)/gproxyd/gproxyd.yaml
	@install -D -m 644 systemd/gproxyd.catalog $(DESTDIR)$(libdir)/systemd/catalog/gproxyd.catalog
	@$(BIN)/python packaging/manual.py build/man
	@$(BIN)/python packaging/completions.py build/completions
	@install -D -m 644 build/man/gproxyd.8 $(DESTDIR)$(datadir)/man/man8/gproxyd.8
	@install -D -m 644 build/man/gproxyd.yaml.5 $(DESTDIR)$(datadir)/man/man5/gproxyd.yaml.5
	@install -D -m 644 build/completions/bash/gproxyd $(DESTDIR)$(datadir)/bash-completion/completions/gproxyd
	@install -D -m 644 build/completions/zsh/_gproxyd $(DESTDIR)$(datadir)/zsh/site-functions/_gproxyd
	@install -D -m 644 build/completions/fish/gproxyd.fish $(DESTDIR)$(datadir)/fish/vendor_completions.d/gproxyd.fish
	@ln -sfn $(prefix)/bin/gproxyd $(DESTDIR)$(bindir)/gproxyd

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
