# Craken: `make` lists what there is.
PYTHON ?= python3
VENV ?= .venv
FLAGS ?=

CRAKEN := $(VENV)/bin/craken
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
STAMP := $(VENV)/.craken-installed
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
NUM_RANKS = $$($(VENV)/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
# accelerate starts the ranks as its file says; craken train reads the settings from the JSON, which are the same
BY_FILES = $(VENV)/bin/accelerate launch --num_processes $(NUM_RANKS) --config_file configs/accelerate_zero$(1).yaml \
	-m craken.train --config configs/ds_zero$(1)_config.json
TRIAL := --model tiny --data craken --steps 60 --seq-len 64 --eval-every 20
LIST := awk -F ':.*\#\# ' 'NF == 2 && $$1 ~ wanted { printf "  make %-21s %s\n", $$1, $$2 }'

.DEFAULT_GOAL := help
.PHONY: help venv install test lint clean \
	craken_ds1_auto craken_ds2_auto craken_ds3_auto craken_ds1 craken_ds2 craken_ds3 \
	test_craken_ds1_auto test_craken_ds2_auto test_craken_ds3_auto test_craken_ds1 test_craken_ds2 test_craken_ds3

help: ## list these targets
	@echo "Train a small language model on Python's own source, on all accelerators found or on 2 CPU processes:"
	@$(LIST) wanted='^craken_' Makefile
	@echo
	@echo "The same, a minute's trial of each:"
	@$(LIST) wanted='^test_craken_' Makefile
	@echo
	@echo "Work on Craken itself:"
	@$(LIST) wanted='^[a-z]*$$' Makefile
	@echo
	@echo "Variables: FLAGS='--steps 50' goes to craken train; PYTHON=python3.12 and VENV=.venv choose the environment."

craken_ds1_auto: $(STAMP) ## ZeRO-1, all settings chosen for you
	$(CRAKEN) train --zero 1 $(FLAGS)

craken_ds2_auto: $(STAMP) ## ZeRO-2, all settings chosen for you (recommended; five minutes on two cores)
	$(CRAKEN) train --zero 2 $(FLAGS)

craken_ds3_auto: $(STAMP) ## ZeRO-3, all settings chosen for you
	$(CRAKEN) train --zero 3 $(FLAGS)

craken_ds1: $(STAMP) ## ZeRO-1, ranks by accelerate launch and configs/accelerate_zero1.yaml, settings from ds_zero1_config.json
	$(call BY_FILES,1) $(FLAGS)

craken_ds2: $(STAMP) ## ZeRO-2 likewise, optimizer state on the host
	$(call BY_FILES,2) $(FLAGS)

craken_ds3: $(STAMP) ## ZeRO-3 likewise
	$(call BY_FILES,3) $(FLAGS)

test_craken_ds1_auto: $(STAMP) ## ZeRO-1, chosen settings, tiny model
	rm -rf runs/trial-ds1-auto
	$(CRAKEN) train --zero 1 $(TRIAL) --output runs/trial-ds1-auto $(FLAGS)

test_craken_ds2_auto: $(STAMP) ## ZeRO-2, chosen settings, tiny model
	rm -rf runs/trial-ds2-auto
	$(CRAKEN) train --zero 2 $(TRIAL) --output runs/trial-ds2-auto $(FLAGS)

test_craken_ds3_auto: $(STAMP) ## ZeRO-3, chosen settings, tiny model
	rm -rf runs/trial-ds3-auto
	$(CRAKEN) train --zero 3 $(TRIAL) --output runs/trial-ds3-auto $(FLAGS)

test_craken_ds1: $(STAMP) ## ZeRO-1, configuration file, tiny model
	rm -rf runs/trial-ds1
	$(call BY_FILES,1) $(TRIAL) --output runs/trial-ds1 $(FLAGS)

test_craken_ds2: $(STAMP) ## ZeRO-2, configuration file, tiny model
	rm -rf runs/trial-ds2
	$(call BY_FILES,2) $(TRIAL) --output runs/trial-ds2 $(FLAGS)

test_craken_ds3: $(STAMP) ## ZeRO-3, configuration file, tiny model
	rm -rf runs/trial-ds3
	$(call BY_FILES,3) $(TRIAL) --output runs/trial-ds3 $(FLAGS)

venv: $(STAMP) ## make the virtual environment and install everything into it
install: $(STAMP) ## the same as venv

test: lint ## style, types and the whole test suite (what CI runs)
	$(VENV)/bin/python -m pytest -m "not gpu"

lint: $(STAMP) ## ruff, its formatter and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict craken

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/.craken_cache

# torch goes in by itself and first: a range that several packages ask for would fetch its newest build instead.
$(STAMP): pyproject.toml constraints.txt $(wildcard dropin/pyproject.toml dropin/*/*.py dropin/*/*/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Craken needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) (the large part)"
	@$(PIP) install $(TORCH)
	@echo "installing craken, its drop-in for deepspeed, transformers and the tools"
	@$(PIP) install -c constraints.txt -e '.[hf,dev]'
	@$(PIP) install -c constraints.txt -e ./dropin
	@touch $@
