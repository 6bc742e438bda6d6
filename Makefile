# make demo [DEMO=full|smoke]   the whole chain on OpenMoji
# make test                     all tests but the exhaustive ones; test-quick: less, test-all: all (docs/testing.md)
#                               TESTS=tests/unit/...: those alone; WORKERS=1: one after another
# make lint                     ruff
# make setup                    .venv alone; the others do it, too, where it is missing or not whole
#                               PYTHON=python3.12: with that Python; SYSTEM_TORCH=1: with the torch that it has
# All that is written, caches too, lies inside .venv and the output folders; names are relative, so blanks may be in
# the checkout's path.

DEMO ?= full
OUTPUT ?= $(if $(filter smoke,$(DEMO)),demo-smoke,demo)
WORKERS ?= auto
RUN ?= .venv/bin/python
SETUP := $(if $(filter .venv/bin/python,$(RUN)),setup)

# What xdist counts by itself are physical cores, of the whole machine: one where two virtual ones may be used. One worker
# more than cores: some tests wait for seconds.
CORES = $$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PYTEST = . .ci/env && PYTEST_XDIST_AUTO_NUM_WORKERS=$$(($(CORES) + 1)) "$(RUN)" -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: setup demo test test-quick test-all lint clean
setup:
	@.ci/setup

demo: $(SETUP)
	. .ci/env && "$(RUN)" train/quickstart.py demo=$(DEMO) output="$(OUTPUT)"

test: $(SETUP)
	$(PYTEST) -m 'not exhaustive' $(TESTS)

test-quick: $(SETUP)
	$(PYTEST) -m 'not exhaustive and not processes and not full_size' $(or $(TESTS),tests/unit)

test-all: $(SETUP)
	$(PYTEST) $(TESTS)

lint: $(SETUP)
	"$(RUN)" -m ruff check .
	"$(RUN)" -m ruff format --check .

clean:
	rm -rf demo demo-smoke
