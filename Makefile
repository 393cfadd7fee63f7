# Each target installs what it needs first; a second run does not reinstall.
#   make train                  the main job: AlphaAdam and AdamW side by side, on this machine
#   make train ARGS=--resume    go on after an interruption
#   make bench                  what a step costs, beside AdamW and its peers
#   make test | test-fast | test-nightly | test-older | test-torchtitan | test-nvme | lint | setup

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

# The oldest DeepSpeed and Accelerate served; constraints.txt holds the newest, which `make test` runs with.
OLDER := deepspeed==0.19.7 accelerate==1.14.0
OLDER_IN := .older

TITAN := torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing==0.1.1 torchdata==0.11.0 tyro==1.0.17 einops==0.8.2 \
    docstring_parser==0.18.0 typeguard==4.6.0
TITAN_IN := .torchtitan

.PHONY: setup train bench test test-fast test-nightly test-older test-torchtitan test-nvme lint

setup: $(INSTALLED)

# torch goes in first and alone: DeepSpeed's build looks for it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[deepspeed,hf,dev]'
	touch $@

train: setup
	$(BIN)/alphaadam train $(ARGS)

bench: setup
	$(BIN)/alphaadam bench $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not nvme and not torchtitan" $(ARGS)

# A thousand random programs, new every time; a failure prints the line that repeats it.
test-nightly: setup
	PROGRAMS=1000 $(BIN)/python -m pytest tests/faults/test_programs.py $(ARGS)

# Laid over the environment, so that the rest stays as it is.
test-older: setup
	test -d $(OLDER_IN)/deepspeed || $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	    --target $(OLDER_IN) $(OLDER)
	PYTHONPATH=$(OLDER_IN) TORCH_EXTENSIONS_DIR=$(OLDER_IN)/extensions $(BIN)/python -m pytest \
	    tests/zero/test_refusals.py tests/zero/test_equality.py tests/hf/test_accelerate.py tests/hf/test_fsdp.py \
	    -k "has_every_name or (two_ranks and exact) or test_accelerate or test_fsdp" $(ARGS)

# torchtitan and what it imports, without the versions of other packages that it asks for.
test-torchtitan: setup
	test -d $(TITAN_IN)/torchtitan || $(BIN)/python -m pip install --quiet --no-deps --target $(TITAN_IN) $(TITAN)
	PYTHONPATH=$(TITAN_IN) $(BIN)/python -m pytest -m torchtitan $(ARGS)

# Needs libaio (apt-get install libaio-dev). Not in `make test`: compiling DeepSpeed's disk I/O takes longer than that.
test-nvme: setup
	$(BIN)/python -m pytest -m nvme $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
