# make bench and make test set everything up on a fresh machine; both are quick the second time.
PYTHON ?= python3
# One version, so that a run can be repeated. A build without CUDA, or another of 2.11 to 2.13, also
# does: make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/ready
ARGS ?=

.PHONY: bench test lint soak gpu clean

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
	        -k "float64 or bit or addresses" || exit 1; \
	done
	$(BIN)/python bench/kernels.py --device cuda --json-out bench/results/gpu-kernels.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is older: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench,test,lint]'
	touch $(READY)
