# make demo [DEMO=full|smoke]   the whole chain on OpenMoji
# make test                     all tests but the exhaustive ones; test-quick: less, test-all: all (docs/testing.md)
#                               TESTS=tests/unit/...: those alone; WORKERS=1: one after another
# make lint                     ruff
# Each sets up .venv first; everything that is cached lies inside it.

PYTHON ?= python3
DEMO ?= full
VENV := $(CURDIR)/.venv
RUN ?= $(VENV)/bin/python
OUTPUT ?= $(if $(filter smoke,$(DEMO)),demo-smoke,demo)
CACHE := $(VENV)/cache
WORKERS ?= auto

export PATH := $(VENV)/bin:$(PATH)
CACHES := XDG_CACHE_HOME=$(CACHE) XDG_CONFIG_HOME=$(CACHE)/config TORCH_EXTENSIONS_DIR=$(CACHE)/torch_extensions \
	TRITON_CACHE_DIR=$(CACHE)/triton TORCHINDUCTOR_CACHE_DIR=$(CACHE)/inductor MPLCONFIGDIR=$(CACHE)/matplotlib \
	WANDB_CACHE_DIR=$(CACHE)/wandb WANDB_CONFIG_DIR=$(CACHE)/wandb WANDB_DATA_DIR=$(CACHE)/wandb HF_HOME=$(CACHE)/hf

# What xdist counts by itself are physical cores, of the whole machine: one where two virtual ones may be used.
CORES = $$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PYTEST = $(CACHES) PYTEST_XDIST_AUTO_NUM_WORKERS=$(CORES) $(RUN) -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-quick test-all lint clean
demo: $(VENV)/installed
	$(CACHES) $(RUN) train/quickstart.py demo=$(DEMO) output=$(OUTPUT)

test: $(VENV)/installed
	$(PYTEST) -m 'not exhaustive' $(TESTS)

test-quick: $(VENV)/installed
	$(PYTEST) -m 'not exhaustive and not processes and not full_size' $(or $(TESTS),tests/unit)

test-all: $(VENV)/installed
	$(PYTEST) $(TESTS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf demo demo-smoke

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
