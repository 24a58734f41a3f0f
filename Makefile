# The two commands: `make demo` and `make test`. Everything below makes its own environment first.
#   make demo [DATA=folder-or-zip] [OUT=folder]   the main job, end to end, on this machine
#   make demo CLUSTER=1                           the same against the cluster of `make cluster`, started if need be
#   make cluster                                  PostgreSQL, Redis, an S3 store, API and workers, without containers
#   make cluster-down, make cluster-status        stop exactly that and keep its data; say what runs
#   make test                                     unit, contract and API tests
#   make faults [FAULTS="--minutes 60"] [SEQUENCES=1000]  kill, stop, cut and flip on purpose (counts add up over runs),
#                                                 then so many random histories of the record (0: none)
#   make fuzz [FUZZ="--minutes 30"]               requests of every kind against a running API, with keys and without
#   make check                                    format, lint, types, imports, then make test
#   make lock                                     write requirements/lock.txt anew (needs uv)
#   make clean                                    remove the environment and caches
# Settings: PYTHON=python3.12 picks the interpreter, TORCH_INDEX=<url> the package index that torch alone comes from
# (README, Installation); CLUSTER_HOME=folder, CLUSTER_API_PORT=number and others of docs/cluster.md.

PYTHON ?= python3
VENV ?= .venv
DATA ?=
OUT ?= demo-output
CLUSTER ?=
FAULTS ?=
SEQUENCES ?= 1000
FUZZ ?=
TORCH_INDEX ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup
BIN := $(VENV)/bin
CLUSTER_TOOL := $(BIN)/python deploy/local/cluster.py
PIP := $(BIN)/python -m pip --disable-pip-version-check

export CLUSTER_HOME CLUSTER_WORKERS CLUSTER_API_PORT CLUSTER_REDIS_PORT CLUSTER_POSTGRES_PORT CLUSTER_S3_PORT \
  CLUSTER_METRICS_PORT

.PHONY: demo test faults fuzz check lint types imports install lock clean cluster cluster-down cluster-status

demo: $(if $(CLUSTER),cluster,install)
	@$(if $(CLUSTER),$(CLUSTER_TOOL),$(BIN)/cffa) demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

cluster: install
	@$(CLUSTER_TOOL) start

cluster-down: install
	@$(CLUSTER_TOOL) stop

cluster-status: install
	@$(CLUSTER_TOOL) status

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(FAULTS)
	$(if $(filter 0,$(SEQUENCES)),,CFFA_SEQUENCES=$(SEQUENCES) $(BIN)/python -m pytest -q -n 0 tests/stateful)

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

check: lint types imports test

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

install: $(VENV)/.installed

$(VENV)/.installed: requirements/lock.txt requirements/torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "CFFA needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/4] making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing the locked libraries (about 300 MB, once)"
	@$(PIP) install --quiet --require-hashes --no-deps -r requirements/lock.txt
	@echo "[3/4] installing torch (200 MB as CPU build, 3 GB with CUDA; the longest step)"
	@$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") -r requirements/torch.txt
	@echo "[4/4] installing CFFA itself"
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock:
	requirements/lock.sh

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
