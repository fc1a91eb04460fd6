# What a developer types; `make` alone prints the list.
# make PYTHON=/path/to/python …                      makes the environment with that interpreter
# make VENV_FLAGS=--system-site-packages …           keeps the torch which that interpreter has
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := python3 python3.13 python3.12 python3.11
EXTRAS := api worker
VENV := .venv
RUN := $(VENV)/bin/python -m
PEERS := build/peers
WEIGHTS := $(VENV)/models/smollm2-135m-instruct/luthier.json
PIP := $(RUN) pip --disable-pip-version-check install --no-input -c $(VENV)/constraints.txt

help: ## print this list
	@awk -F ' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/run.stamp ## fine-tune the built-in model on the example data and show it against its base
	@$(VENV)/bin/luthier demo

up: $(VENV)/run.stamp ## run everything on this machine until Ctrl-C
	@$(VENV)/bin/luthier up

setup: $(VENV)/dev.stamp $(WEIGHTS) ## install all that development needs into .venv

check: $(VENV)/dev.stamp ## formatting, lint, types and import rules, as CI runs them
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports

fmt: $(VENV)/dev.stamp ## format and mend what can be mended
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

test: $(VENV)/dev.stamp $(WEIGHTS) ## all tests; ARGS='-k word' for some
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: $(VENV)/dev.stamp ## break a private service on purpose, a seeded choice of faults; ARGS='--seed 8'
	$(RUN) tests.chaos $(ARGS)

chaos-all: $(VENV)/dev.stamp ## every fault of docs/reliability.md, and a stock queue beside three of them
	$(RUN) tests.chaos --all $(ARGS)

soak: $(VENV)/dev.stamp ## random faults for half an hour, memory watched; ARGS='--soak 300' for less
	$(RUN) tests.chaos --soak 1800 $(ARGS)

bare: | $(VENV)/bin/python ## prove each of the extras api and worker in an environment that holds nothing else
	@sh tests/structure/bare.sh $(VENV)/bin/python $(EXTRAS)

clients: $(VENV)/dev.stamp ## run the whole flow with older releases of the official client
	$(RUN) tests.e2e.clients $(ARGS)

bench-flow: $(VENV)/run.stamp ## measure how long a user waits at the seams of a job; ARGS='--runs 5'
	$(VENV)/bin/python benchmarks/flow.py --data-dir build/bench-flow $(ARGS)

bench-serve: $(VENV)/dev.stamp $(WEIGHTS) ## measure answers, alone and beside peers; ARGS='s1 --peers peft llama'
	PYTHONPATH=. OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(VENV)/bin/python benchmarks/serve.py $(ARGS)

bench-peers: $(PEERS)/serve_llama.stamp $(PEERS)/serve_transformers.stamp $(PEERS)/serve_vllm.stamp ## install what bench-serve compares with

bench-train: $(VENV)/run.stamp $(WEIGHTS) $(PEERS)/train.stamp ## measure training against TRL; ARGS='b1 --rows 32 --epochs 1'
	PYTHONPATH=. $(VENV)/bin/python benchmarks/train.py --model-dir $(dir $(WEIGHTS)) --peer-python $(PEERS)/train/bin/python $(ARGS)

bench-memory: $(VENV)/run.stamp $(WEIGHTS) ## memory and time a token of training as the work grows; ARGS='--adapter qlora'
	PYTHONPATH=. $(VENV)/bin/python benchmarks/memory.py --model-dir $(dir $(WEIGHTS)) $(ARGS)

migration: $(VENV)/dev.stamp ## draft a migration from the change in the tables; NAME='add x to y'
	@$(RUN) migrations.draft "$(NAME)"

clean: ## remove the environment and what tools left; data stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.PHONY: help demo up setup check fmt test chaos chaos-all soak bare clients bench-flow bench-serve bench-peers bench-train bench-memory migration clean

# A stamp is as old as the installation it stands for.
$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(call install,api$(,)worker$(,)embedded)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(call install,api$(,)worker$(,)embedded$(,)dev)
	@touch $@ $(VENV)/run.stamp

$(PEERS)/train.stamp: benchmarks/train_peer.txt | $(VENV)/bin/python
	@$(RUN) venv --clear $(PEERS)/train
	@$(PEERS)/train/bin/python -m pip --disable-pip-version-check install --no-input -q -r benchmarks/train_peer.txt
	@touch $@

$(PEERS)/serve_%.stamp: benchmarks/serve_%.txt | $(VENV)/bin/python
	@$(RUN) venv --clear $(PEERS)/serve_$*
	@$(PEERS)/serve_$*/bin/python -m pip --disable-pip-version-check install --no-input -q -r $<
	@touch $@

# The tests contact nothing but this machine, so the weights of the built-in model are there before them.
$(WEIGHTS): app/core/catalogue.toml | $(VENV)/dev.stamp
	@$(VENV)/bin/luthier models pull smollm2-135m-instruct --data-dir $(VENV)
	@touch $@

, := ,
KEPT_TORCH := import importlib.metadata as m, sys; \
  torch = m.distribution("torch"); \
  sys.exit(1) if str(torch.locate_file("")).startswith(sys.prefix) else print(torch.version)

# torch alone, with its progress shown: it is by far the largest. One that the machine brought along stays.
define install
echo "Installing into $(VENV); the first time takes some minutes." && \
kept=$$($(VENV)/bin/python -c '$(KEPT_TORCH)' 2>/dev/null || sed -n 's/^torch==//p' constraints.txt) && \
sed "s/^torch==.*/torch==$$kept/" constraints.txt > $(VENV)/constraints.txt && \
$(PIP) -q setuptools && \
$(PIP) torch && \
$(PIP) -q --no-build-isolation -e '.[$(1)]'
endef

$(VENV)/bin/python:
	@for python in $(PYTHON); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; \
	  then echo "Making $(VENV) with $$($$python --version)."; exec $$python -m venv --clear $(VENV_FLAGS) $(VENV); fi; \
	done; \
	echo "make: no Python 3.11 to 3.13 with the venv module was found; install one, or name it: make PYTHON=/path/to/python" >&2; \
	exit 1
