# Every target works first on a bare machine: Python 3.11, pip, make and git.
.DEFAULT_GOAL := help
MODEL ?= training/demo/checkpoint
NAME ?= $(notdir $(MODEL:/checkpoint=))

.PHONY: help install serve test check lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv from the lock file; under a second when nothing has changed
	@scripts/install

serve: install ## serve the demo model on port 8000 (MODEL=folder SALA_SERVE_PORT=port)
	@exec .venv/bin/sala-serve up "$(MODEL)" --served-model-name "$(NAME)"

test: install ## run every test (SALA_TEST_SELECT="tests/serve -x" for some)
	@scripts/test

check: install ## lint, formatting, types, shell, spelling, file length
	@scripts/check

lock: ## resolve requirements/cpu.lock anew
	@scripts/lock

clean: ## remove the environment and every cache
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
