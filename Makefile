# Every target sets up .venv by itself, with the versions in constraints.txt; any of them can be run first.
#   make demo     fine-tune the embedded backbone on aspirin, evaluate it, run it: plots and an adapter in demo/
#   make test     the test suite
#   make lint     ruff (rules and format) and mypy
#   make clean    remove what the other targets made, .venv included
# Another interpreter: make demo PYTHON=python3.12
# All paths here are relative, so the folder of the project may have spaces in its name.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

test: $(STAMP)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(STAMP)
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

# Checked: the interpreter before anything is made; the stamp is touched last, so an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	    echo "mmea needs Python >= 3.10; '$(PYTHON)' was not found: install it, or name another one with make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 10) or sys.exit("mmea needs Python >= 3.10; $(PYTHON) is " + v + ": name a newer one with make PYTHON=python3.12")'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: install its venv module (on Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) (a few minutes, once)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
