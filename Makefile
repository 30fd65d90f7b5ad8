# make demo    a small language model gets better by PPO, on this machine
# make test    linter, type checker, tests
# make help    the rest

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := outputs/demo

.PHONY: help setup demo test lint unit clean

help:
	@grep -E '^# make|^[a-z]+:.*##' Makefile | sed -e 's/^# //' -e 's/:.*## /\t/'

setup: ## create .venv from the committed lock (at once when it is there)
	@$(PYTHON) requirements/install.py

test: setup lint unit ## linter, type checker, tests

lint: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy minigpt_ray actors jobs

unit: setup ## pytest
	.venv/bin/pytest

demo: setup ## prepare, SFT, PPO, evaluate: about a quarter of an hour on two cores
	$(RUN) -m jobs.prepare_data configs/demo/prepare_data.yaml
	$(RUN) -m jobs.sft configs/demo/sft.yaml
	$(RUN) -m jobs.ppo configs/demo/ppo.yaml
	$(RUN) -m jobs.evaluate configs/demo/evaluate.yaml

clean: ## remove what runs have written
	rm -rf outputs
