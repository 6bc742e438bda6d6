# make demo [DEMO=full|smoke]   the whole chain on OpenMoji
# make test                     all tests
# make lint                     ruff
# Each sets up .venv first; everything that is cached lies inside it.

PYTHON ?= python3
DEMO ?= full
VENV := $(CURDIR)/.venv
RUN ?= $(VENV)/bin/python
OUTPUT ?= $(if $(filter smoke,$(DEMO)),demo-smoke,demo)
CACHE := $(VENV)/cache

export PATH := $(VENV)/bin:$(PATH)
CACHES := XDG_CACHE_HOME=$(CACHE) XDG_CONFIG_HOME=$(CACHE)/config TORCH_EXTENSIONS_DIR=$(CACHE)/torch_extensions \
	TRITON_CACHE_DIR=$(CACHE)/triton TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor MPLCONFIGDIR=$(CACHE)/matplotlib \
	WANDB_CACHE_DIR=$(CACHE)/wandb WANDB_CONFIG_DIR=$(CACHE)/wandb WANDB_DATA_DIR=$(CACHE)/wandb HF_HOME=$(CACHE)/hf

.PHONY: demo test lint clean
demo: $(VENV)/installed
	$(CACHES) $(RUN) train/quickstart.py demo=$(DEMO) output=$(OUTPUT)

test: $(VENV)/installed
	$(CACHES) $(RUN) -m pytest $(TESTS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf demo demo-smoke

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
