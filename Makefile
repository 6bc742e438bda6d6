# make demo [DEMO=full|smoke]   the whole chain on OpenMoji
# make test                     all but the exhaustive tests; test-quick: fewer, test-all: all (docs/testing.md)
#                               TESTS=tests/unit/...: only those; WORKERS=1: one after another
# make lint                     ruff
# make setup                    only .venv; the other targets also make it if it is missing or incomplete
#                               PYTHON=python3.12: with that Python; SYSTEM_TORCH=1: with that Python's torch
# Everything written, caches included, lies inside .venv and the output folders; names are relative, so the checkout's
# path may contain blanks.

DEMO ?= full
OUTPUT ?= $(if $(filter smoke,$(DEMO)),demo-smoke,demo)
WORKERS ?= auto
RUN ?= .venv/bin/python
SETUP := $(if $(filter .venv/bin/python,$(RUN)),setup)

# By default xdist counts physical cores of the whole machine: one where two virtual ones may be used. One worker more
# than cores, as some tests wait for seconds.
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
	$(PYTEST) -m 'not exhaustive and not processes and not full_size and not slow' $(or $(TESTS),tests/unit)

test-all: $(SETUP)
	$(PYTEST) $(TESTS)

lint: $(SETUP)
	"$(RUN)" -m ruff check .
	"$(RUN)" -m ruff format --check .

clean:
	rm -rf demo demo-smoke
