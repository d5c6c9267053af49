# make bench and make test set everything up on a fresh machine; both are quick the second time.
PYTHON ?= python3
# One version, so that a run can be repeated. A build without CUDA, or another of 2.11 to 2.13, also
# does: make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
# === takes the plain version, the one with CUDA, where pip also finds a local build such as +cpu.
CUDA_TORCH ?= torch===2.13.0
BIN := .venv/bin
READY := .venv/ready
ARGS ?=

.PHONY: bench test lint soak gpu cuda-link clean

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

soak: $(READY)
	$(BIN)/python -m pytest -m soak $(ARGS)

# Everything that only a GPU can tell: its tests, the kernels' memory and races, and their speed.
gpu: $(READY)
	$(BIN)/python -m pytest -m "cuda or triton" $(ARGS)
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(BIN)/python -m pytest tests/kernels/test_adamw.py tests/kernels/test_block_sums.py \
	        tests/library/test_mlp.py -k "float64 or bit or addresses or (cuda and like_eager)" || exit 1; \
	done
	$(BIN)/python bench/kernels.py --device cuda --json-out bench/results/gpu-kernels.json
	$(BIN)/python bench/run.py --device cuda --equal-time-budget --interleave \
	    --json-out bench/results/gpu-text.json

# Compiles and links all of the extension against a torch with CUDA (gigabytes), loads it and runs
# the CPU's tests. Needs nvcc, and no GPU. A copy, so that nothing here is built anew.
cuda-link:
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && trap 'exit 1' INT TERM && \
	tar -cf - --exclude=.venv --exclude=./build --exclude='*.so' . | tar -xf - -C "$$work" && \
	cd "$$work" && $(PYTHON) -m venv .venv && \
	$(BIN)/pip install --quiet --disable-pip-version-check $(CUDA_TORCH) && \
	BLOCKSCHED_EXT=1 BLOCKSCHED_CUDA=1 \
	    $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench,test]' && \
	$(BIN)/python -m blocksched && \
	$(BIN)/python -c 'from blocksched.extension import HAS_CUDA, reason; assert HAS_CUDA, reason' && \
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info blocksched/_C*.so blocksched/_build.json

# An edited source of the extension builds it again.
$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is older: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench,test,lint]'
	touch $(READY)
	$(BIN)/python -m blocksched
