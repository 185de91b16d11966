# A fresh checkout needs only Python (3.10 or newer) and make: each target installs its
# requirements into .venv first, once per change of pyproject.toml.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

# The tests of a file share trainings, so one worker runs them all, long files first. One thread per
# worker, because more threads compete and change the order of sums.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The commands that tests start would compile every import.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install lint types test test-slow test-cluster test-lowest train check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Install the package, editable, with the development tools into .venv

lint: $(VENV)/.dev ## Check style and formatting (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## Check types (pyright)
	$(BIN)/pyright --project pyproject.toml

test: $(VENV)/.dev ## Run the quick tests; ARGS="-k kl" goes to pytest, WORKERS=4 sets processes
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not cluster" $(ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow $(ARGS)

test-cluster: $(VENV)/.dev ## Train under SLURM and on two hosts, on this machine (Linux, root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m cluster tests/cluster $(ARGS)

# Old versions call APIs that newer versions of their dependencies deprecate; torch 2.9 also warns
# about an API that was never replaced.
test-lowest: $(LOWEST)/.dev ## Run the quick tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST) -m "not slow and not cluster" \
		-W ignore::DeprecationWarning -W ignore::FutureWarning \
		-W "ignore:Please use the new API settings:UserWarning" $(ARGS)

train: $(VENV)/.runtime ## Train; ARGS="dataset=mnist model=tiny" goes to Hydra
	$(BIN)/python -m nvae_lightning.train $(ARGS)

check: lint types test ## Run everything that a change must pass: lint, types, test

clean: ## Delete caches and builds, but neither .venv nor runs
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# uv is fast; pip is used if uv is unavailable or fails.
define install
@echo "Installing $(1) into $(VENV)"
@{ $(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	&& $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '$(1)'; } \
	|| { echo "uv failed; installing with pip" \
	&& $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)'; }
endef

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	$(call install,.[dev])
	@touch $(VENV)/.runtime $@

# The resolver picks the newest fsspec first, which excludes the oldest datasets.
$(LOWEST)/.dev: pyproject.toml | $(VENV)/.dev
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--editable '.[dev]' 'datasets==4.0.*'
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.created
	$(call install,.)
	@touch $@

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null \
		|| { echo "$(PYTHON) not found; choose another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10; choose another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot create virtual environments; on Debian or Ubuntu:" \
			"apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
