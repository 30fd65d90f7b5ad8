# make demo    a small language model gets better by PPO, on this machine
# make test    linter, type checker, tests
# make help    the rest

PYTHON ?= python3
RUN ?= demo
SEED ?= 0
WORKERS ?= 2
FAULTS ?= 110
FORM ?= narrow
BENCH ?=
BENCH_SUPERVISED ?=

.PHONY: help setup demo life test lint unit test-cluster chaos bench clean

help:
	@grep -E '^# make|^[a-z-]+:.*##' Makefile | sed -e 's/^# //' -e 's/:.*## /\t/'

setup: ## create .venv from the committed lock (at once when it is there)
	@$(PYTHON) requirements/install.py

test: setup lint unit ## linter, type checker, tests

lint: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --num-workers=2 minigpt_ray actors jobs benchmarks

unit: setup ## pytest, two files at a time (WORKERS=2): a job that starts keeps one core busy
	.venv/bin/pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

test-cluster: setup ## a cluster of three hosts in network namespaces (needs root; else three nodes on one host)
	.venv/bin/pytest -m cluster tests/cluster

chaos: setup ## harm running jobs in every way that is known, for hours; goes on where it was stopped (FAULTS=110 FORM=narrow, wide or hosts)
	.venv/bin/python -m tests.chaos --form $(FORM) --faults $(FAULTS)

demo: setup ## prepare, SFT, PPO, evaluate, in less than ten minutes on two cores (RUN=demo SEED=0); goes on where it was stopped
	.venv/bin/python -m jobs.pipeline configs/demo/pipeline.yaml run=$(RUN) seed=$(SEED)

life: RUN = life
life: setup ## pretrain, midtrain, SFT, preference pairs, reward model, DPO, PPO, evaluate (RUN=life SEED=0); goes on where it was stopped
	.venv/bin/python -m jobs.pipeline configs/life/pipeline.yaml run=$(RUN) seed=$(SEED)

bench: ## on quiet cores: PPO against TRL, supervised stages against a bare torch loop (BENCH="--rounds 1 --steps 2" BENCH_SUPERVISED="--rounds 1")
	@$(PYTHON) requirements/install.py --bench
	.venv/bin/python -m benchmarks.ppo_vs_trl $(BENCH)
	.venv/bin/python -m benchmarks.supervised_vs_torch $(BENCH_SUPERVISED)

clean: ## remove what runs have written
	rm -rf outputs
