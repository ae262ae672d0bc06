# One command for each job; each brings .venv and the extension up to date first. Needs Python >= 3.10 and a C++ compiler.
#   make test | test-gpu-without-gpu | gpu | demo [MARGIN='...'] | lint | format | bench [INSIGHTFACE=PATH] | mutants | build | clean
#   TORCH=torch==2.13.0  PYTHON=python3

PYTHON ?= python3
TORCH ?= torch==2.13.0
MARGIN ?=
INSIGHTFACE ?=

BIN := .venv/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
LIBRARY := fused_margin/_C.abi3.so
# Another TORCH is another stamp: it is installed, and compiled against from the start.
STAMP := .venv/torch-$(firstword $(shell echo '$(TORCH)' | cksum))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.PHONY: test test-gpu-without-gpu gpu demo lint format bench mutants build clean
.DELETE_ON_ERROR:

test: build
	@$(BIN)/python -m pytest -q

# Every proof of the GPU kernels, the slow ones too, races of the CPU kernels, and the tables of docs/gpu.md.
test-gpu-without-gpu: build
	@rm -rf build/proof
	@FUSED_MARGIN_PROOF=build/proof $(BIN)/python -m pytest -q -m "not gpu" tests/gpu_without_gpu tests/cpu_threads
	@$(BIN)/python -m tests.gpu_without_gpu.proof build/proof --write docs/gpu.md
	@$(BIN)/python -m bench.roofline --write docs/gpu.md

# On a machine with a GPU, with a TORCH that sees it: is the Triton backend right, and how fast?
gpu: build
	@$(BIN)/python -m bench.gpu

demo: build
	@$(BIN)/python examples/glyphs.py $(if $(MARGIN),--margin '$(MARGIN)')

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CSRC)

# Measures what is missing, most of an hour if nothing is there; `python -m bench --help` for parts of it.
bench: build .venv/peers
	@$(BIN)/python -m bench $(if $(INSIGHTFACE),--insightface '$(INSIGHTFACE)')
	@$(BIN)/python -m bench.table --write README.md docs/performance.md
	@$(BIN)/python -m bench.plot

mutants: build
	@$(BIN)/python -m tests.mutants

build: .venv/installed $(LIBRARY)

# What was built; .venv, slow to get, stays.
clean:
	@rm -rf build dist *.egg-info $(LIBRARY) .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "installing $(TORCH) into .venv ..."
	@$(BIN)/python -m pip install -qq '$(TORCH)' ninja 'setuptools>=77'
	@rm -rf build .venv/torch-* && touch $@

# The library is left to the next rule, which compiles only what changed; pip would start from nothing each time.
.venv/installed: $(STAMP) pyproject.toml
	@echo "installing fused_margin and what its tests, demo and linters need into .venv ..."
	@FUSED_MARGIN_CPU=0 $(BIN)/python -m pip install -qq --no-build-isolation -e '.[test,demo,bench,dev]'
	@touch $@

# What the bench compares with. Rows of what cannot be installed say so. torch stays as it is.
.venv/peers: .venv/installed
	@echo "installing what the bench compares with into .venv ..."
	@FUSED_MARGIN_CPU=0 $(BIN)/python -m pip install -qq --no-build-isolation '$(TORCH)' -e '.[bench,peers]' \
		&& touch $@ || echo "not all of it could be installed: the rows say what is missing"

$(LIBRARY): $(STAMP) setup.py pyproject.toml $(CSRC)
	@echo "building $@ ..."
	@$(BIN)/python setup.py -q build_ext --inplace >.venv/build.log || { cat .venv/build.log; exit 1; }
