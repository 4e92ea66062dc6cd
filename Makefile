# Every target works first on a bare machine: Python 3.11, pip, make and git.
.DEFAULT_GOAL := help
MODEL ?= training/demo/checkpoint
NAME ?= $(notdir $(MODEL:/checkpoint=))

.PHONY: help install serve test check bench bench-gpu lock demo-checkpoint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv from the lock file; under a second when nothing has changed
	@scripts/install

serve: install ## serve the demo model on port 8000 (MODEL=folder SALA_SERVE_PORT=port)
	@exec .venv/bin/sala-serve up "$(MODEL)" --served-model-name "$(NAME)"

test: install ## run every test (SALA_TEST_SELECT="tests/serve -x" for some)
	@scripts/test

check: install ## lint, formatting, types, shell, spelling, file length
	@scripts/check

bench: install ## check the operators, then time them and the engine against references (5 minutes)
	@.venv/bin/python kernels/bench/run.py

bench-gpu: ## measure kernels and engine on this machine's GPU (PYTHON=a python with torch for CUDA and vLLM)
	@scripts/bench-gpu $(BENCH_ARGS)

lock: ## resolve requirements/cpu.lock anew
	@scripts/lock

demo-checkpoint: ## train the demo model anew on this machine's GPU (PYTHON=a python with torch for CUDA)
	@scripts/demo-checkpoint

clean: ## remove the environment and every cache
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
