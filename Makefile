# make demo      two generations on real typefaces, end to end; again: what is there is left alone; FRESH=1: start over
# make test      the suite                make lint      style and types
# make faults    tests of what dies       make soak      KILLS=100 of a quickstart run, at random moments
# make long      tests that take minutes
# make install   .venv alone              make cluster   a local Ray; make cluster-stop ends it
# make sbom      sbom.json, of all parts  make lock      resolve the versions anew
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One home for data, runs and the MLflow store, wherever Ray runs the code.
export BCT_HOME ?= $(CURDIR)
# Threads that wait must sleep, not spin: set before torch starts.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export RAY_USAGE_STATS_ENABLED := 0
# Whoever can reach a Ray cluster can run code on it: a token from the first start on, in ~/.ray/auth_token.
export RAY_AUTH_MODE := token
# Ray gives its workers the lowest priority; here they are what the machine is for.
export RAY_worker_niceness := 0
RAY_PORT ?= 6379
DASHBOARD_PORT ?= 8265

.PHONY: install demo test faults long soak lint cluster cluster-stop lock sbom clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; run make with PYTHON=/path/to/a/newer/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	.ci/install $(BIN)/python
	@touch $@

demo: install cluster
	@$(BIN)/python jobs/train_bct.py $(if $(FRESH),--fresh)
	@echo "stop Ray     make cluster-stop"

# A Ray that is up on this machine is used as it is.
cluster: install
	@$(BIN)/ray status >/dev/null 2>&1 || { \
		mkdir -p .ray; $(BIN)/ray get-auth-token --generate >/dev/null 2>&1; \
		setsid nohup $(BIN)/ray start --head --block --port=$(RAY_PORT) --dashboard-host=127.0.0.1 \
			--dashboard-port=$(DASHBOARD_PORT) >.ray/log 2>&1 & echo $$! >.ray/pid; \
		for _ in $$(seq 60); do $(BIN)/ray status >/dev/null 2>&1 && exit 0; sleep 1; done; \
		echo "error: Ray did not start; see .ray/log, or choose RAY_PORT= and DASHBOARD_PORT=" >&2; exit 2; }

# Ends the Ray that `make cluster` started here, and no other: all processes of its session.
cluster-stop:
	@test ! -f .ray/pid || { ps -s "$$(cat .ray/pid)" -o pid= | xargs -r kill -TERM; sleep 3; \
		ps -s "$$(cat .ray/pid)" -o pid= | xargs -r kill -KILL; rm -f .ray/pid; }

# File by file in their order: the long ones, end to end, come first, so that both processes end together.
SUITE := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install
	$(SUITE)

faults: install
	$(SUITE) -m faults

long: install
	$(SUITE) -m long

soak: install
	$(BIN)/python -m tests.soak --kills $(or $(KILLS),100) --home $(or $(SOAK_HOME),.soak)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# After a change of pyproject.toml: resolve anew.
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade setuptools --editable ".[dev,npm]"
	.ci/lock $(BIN)/python
	@touch $(VENV)/.installed

# The software bill of materials: CycloneDX, of all that the lock names, with the files' sha256.
sbom: install
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file sbom.json requirements.lock

clean:
	rm -rf $(VENV) build sbom.json *.egg-info
