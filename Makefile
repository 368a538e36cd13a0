# What a newcomer types: `make demo`, `make test`. Everything runs from .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo lab gpu-check test test-fast test-ray test-slow test-browser lint format \
	docs release-check clean-demo

install: $(STAMP)

# The virtual environment is reused until the pins or the package metadata change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ke_ray needs Python >= 3.11; '$(PYTHON)' is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: install
	$(BIN)/ke-ray demo

# A three-host Ray cluster with S3 and MLflow to play with, made of namespaces: Linux and root.
lab: install
	PYTHONPATH=tests/hosts:tests/helpers $(BIN)/python -m lab_shell $(ARGS)

test: lint
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: the models are tiny, and a start of Ray is waiting as much as
# work. tests/conftest.py says which tests stay together, for what they share, and which go first.
# Where Python is told to write no bytecode, each of their processes would compile ke_ray anew, which
# takes up to a second.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# Parts of `make test`, which runs them all at once, so that they start what they share once.
# Tests that need a CUDA device run here where there is one, and skip saying so elsewhere.
test-fast: install
	$(PYTEST) -m "not ray and not slow and not browser"

test-ray: install
	$(PYTEST) -m "ray and not slow"

test-slow: install
	$(PYTEST) -m "slow"

test-browser: install
	$(PYTEST) -m "browser and not slow and not ray"

# Meant for one card and ten minutes, with whatever python has torch, transformers and pytest: no Ray
# and no .venv. ARGS=--tiny runs it on a CPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in build/site; `python -m http.server --directory build/site` serves it.
# Needs no network, and neither do its readers.
docs: install
	$(BIN)/python docs/site/sources.py build/docs
	$(BIN)/python -m zensical build --clean --strict

# Before a release: packages that can be uploaded and work without the checkout, and files that
# agree on the version. Needs a package index for `build` and `twine`.
release-check: install docs
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(PYTEST) tests/cli/test_wheel.py tests/jobs/test_image.py tests/test_docs.py
	$(BIN)/python tests/release/check_release.py

clean-demo:
	rm -rf runs/demo
