# `make demo` runs the main job and `make test` all tests; both first set up .venv, if that has not been done yet.
#
#   make demo ARGS=--train           trains the generator first; other options: make demo ARGS=--help
#   make test ARGS="-k kernels -x"   other options of pytest
#   make test WORKERS=0 ARGS=--pdb   in one process, as a debugger needs it
#   make demo PROCESSES=1            as many processes, with or without GPUs
#   make PYTHON=python3.12 ...       which Python .venv is made of (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

PROCESSES ?= 2
WORKERS ?= 2
THREADS ?= 1
# --multi_gpu is what makes Accelerate start several processes, also where there is no GPU
LAUNCH = $(BIN)/accelerate launch $(if $(filter-out 1,$(PROCESSES)),--multi_gpu --main_process_port 0) \
	--num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
# By files, because tests of a file share what is made once; in the order of tests/conftest.py
SPREAD = --dist loadfile --no-loadscope-reorder
BROWSERS := chromium-headless-shell chromium chromium-browser google-chrome

# Many tiny tensors: more threads only get into each other's way
export OMP_NUM_THREADS ?= $(THREADS)

.DEFAULT_GOAL := help
.PHONY: help setup browser demo demo-small test test-fast quality style docs notebooks dist clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dsco_hf needs Python 3.11 or newer, got `$(PYTHON) -V`: pass another one, make PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip hatchling editables
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # pip compiles on one core only
	@touch $@

setup: $(STAMP)  ## create .venv with the pinned versions

demo: $(STAMP)  ## the main job: concentrate the digits, train evaluators, write outputs/quickstart
	$(LAUNCH) recipes/quickstart.py $(ARGS)

demo-small: $(STAMP)  ## the same at a small setting, under 2 minutes
	$(LAUNCH) recipes/quickstart.py --small $(ARGS)

# Tests of pages need one; elsewhere `.venv/bin/playwright install chromium` brings it, and without any they are skipped
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit; done; \
		[ "`id -u`" = 0 ] && grep -qs '^ID=debian' /etc/os-release && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell \
		>/dev/null || echo "no browser could be installed: tests of pages may be skipped" >&2

test: $(STAMP) browser  ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) $(SPREAD) $(ARGS)

test-fast: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) $(SPREAD) -m "not slow" $(ARGS)

quality: $(STAMP)  ## what must pass before a commit: lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)  ## repairs what can be repaired automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## the site, in build/site; no warning is let pass
	$(BIN)/python docs/assemble.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/.docs  ## docs/notebooks/*.py as notebooks, in build/notebooks
	mkdir -p build/notebooks
	for page in docs/notebooks/*.py; do \
		$(BIN)/jupytext --quiet --to notebook --output build/notebooks/`basename $$page .py`.ipynb $$page || exit 1; done

dist: $(VENV)/.release  ## wheel and sdist, in dist/, with their metadata checked
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/twine check --strict dist/*

# What these need beyond the tests: the extra of that name
$(VENV)/.%: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$*]'
	@touch $@

clean:  ## removes caches and builds; .venv and outputs/ stay
	rm -rf build dist
	find . -path './$(VENV)' -prune -o -type d \( -name __pycache__ -o -name .mypy_cache -o -name .pytest_cache \
		-o -name .ruff_cache \) -prune -exec rm -rf {} +
