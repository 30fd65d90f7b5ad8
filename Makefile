# make demo    a small language model gets better by PPO, on this machine
# make test    linter, type checker, tests
# make help    the rest

PYTHON ?= python3
RUN ?= demo
SEED ?= 0
BENCH ?=
BENCH_SUPERVISED ?=

.PHONY: help setup demo life test lint unit bench clean

help:
	@grep -E '^# make|^[a-z]+:.*##' Makefile | sed -e 's/^# //' -e 's/:.*## /\t/'

setup: ## create .venv from the committed lock (at once when it is there)
	@$(PYTHON) requirements/install.py

test: setup lint unit ## linter, type checker, tests

lint: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy minigpt_ray actors jobs benchmarks

unit: setup ## pytest
	.venv/bin/pytest

demo: setup ## prepare, SFT, PPO, evaluate, in less than ten minutes on two cores (RUN=demo SEED=0); goes on where it was stopped
	.venv/bin/python -m jobs.pipeline configs/demo/pipeline.yaml run=$(RUN) seed=$(SEED)

life: RUN = life
life: setup ## pretrain, SFT, preference pairs, reward model, DPO, PPO, evaluate (RUN=life SEED=0); goes on where it was stopped
	.venv/bin/python -m jobs.pipeline configs/life/pipeline.yaml run=$(RUN) seed=$(SEED)

bench: ## on quiet cores: supervised stages against a bare torch loop, PPO against TRL (BENCH_SUPERVISED="--rounds 1" BENCH="--rounds 1 --steps 2")
	@$(PYTHON) requirements/install.py --bench
	.venv/bin/python -m benchmarks.supervised_vs_torch $(BENCH_SUPERVISED)
	.venv/bin/python -m benchmarks.ppo_vs_trl $(BENCH)

clean: ## remove what runs have written
	rm -rf outputs
