# Every target sets up all it needs: a virtual environment in .venv, torch, the development tools and the build.
#   make demo PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"    chooses where torch comes from
#   make test ARGS="tests/test_values.py -k cosine"                            passes arguments on

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
OLDEST_TORCH_VERSION ?= 2.11.0
PIP_TORCH ?=
ARGS ?=
RESULTS ?=
QUICK ?=
NVCC ?= $(if $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc,$(shell command -v nvcc))

SHELL := /bin/bash -o pipefail
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Idle OpenMP threads that spin slow down a machine with few cores; waking them would count in a benchmark.
demo test test-oldest sanitize coverage mutants: export OMP_WAIT_POLICY := PASSIVE

BIN := .venv/bin
INSTALL := -m pip install --quiet
BUILD_TOOLS := numpy 'setuptools>=77' wheel ninja
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SIMT := $(shell find tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TORCH := .venv/.torch-$(TORCH_VERSION)
BUILT := .venv/.built
OLDEST := build/env-oldest/.torch-$(OLDEST_TORCH_VERSION)
DEMO := runs/demo

.PHONY: help demo test test-oldest sanitize coverage mutants lint format cuda gpu-check bench wheel sdist clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo         train a small network, then compare speed with plain PyTorch (two minutes after set-up)"
	@echo "make test         run the tests; make test-oldest: values and derivatives under torch $(OLDEST_TORCH_VERSION)"
	@echo "make lint         ruff, mypy, clang-format; make format: let ruff and clang-format rewrite"
	@echo "make cuda         compile the CUDA sources for sm_80 and sm_90, if there is an nvcc, and show what each kernel takes"
	@echo "make sanitize     the emulated CUDA kernels under AddressSanitizer and UBSan, and under the race check"
	@echo "make coverage     which lines of the CUDA kernels the tests reach; make mutants: do they find planted mistakes?"
	@echo "make gpu-check    on a machine with an NVIDIA GPU, its own torch and nvcc: build, test and time there; RESULTS=dir"
	@echo "make bench        time every operator against the strongest alternatives"
	@echo "make wheel        build a wheel and try it in a fresh environment; make sdist: the same for the sources"
	@echo "make clean        remove what was built, except .venv"

demo: $(BUILT)
	@$(BIN)/python -m metafast train --data glyphs --train-ways 30 --train-queries 5 --steps 900 --schedule cosine \
	  --validate-every 300 --validation-episodes 100 --test-shots 1 5 --episodes 600 --overwrite --out $(DEMO)
	@echo
	@$(BIN)/python -m metafast analyze --checkpoint $(DEMO) --episodes 200
	@echo
	@env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.ratios --quick
	@echo
	@echo "pictures: $(DEMO)/learning-curve.png"
	@echo "          $(DEMO)/episode.png"
	@echo "          $(DEMO)/generalisation.png"

# METAFAST_SIMT makes it an error that the emulator cannot be built.
test: $(BUILT)
	METAFAST_SIMT=plain $(BIN)/python -m pytest $(ARGS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(SIMT)

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) $(SIMT)

bench: $(BUILT)
	$(BIN)/python -m benchmarks.ratios $(ARGS)

# The library of this checkout, built with the newest torch, under the oldest; then the sources against its headers.
test-oldest: $(BUILT) $(OLDEST)
	build/env-oldest/bin/python -m pytest tests/test_import.py tests/test_binary.py tests/test_values.py \
	  tests/test_derivatives.py -k "not cpu128 and not cpu256"
	@echo "building against the headers of torch $(OLDEST_TORCH_VERSION)"
	@TORCH_CUDA_ARCH_LIST=9.0 build/env-oldest/bin/python setup.py build_ext --build-temp build/oldest --build-lib build/oldest \
	  > build/oldest.log 2>&1 || { cat build/oldest.log; exit 1; }

# The kernels of csrc/cuda in the emulator; here they take 5 and 20 times as long, so large shapes and the other orders
# of threads are left out.
SANITIZED := tests/test_values.py tests/test_errors.py tests/test_linear_head.py tests/test_mlp.py tests/test_ridge.py \
  tests/test_matching.py tests/test_conv_block.py tests/test_norm_relu_pool.py \
  -k "not test_large and not test_many and not same_bits and not emulated-reverse and not emulated-random \
  and (not test_every_option or (beyond and number and cross))"
sanitize: $(BUILT)
	$(BIN)/python -m tests.simt.sanitized $(SANITIZED)
	METAFAST_SIMT=race $(BIN)/python -m pytest -q $(SANITIZED)

coverage: $(BUILT)
	$(BIN)/python -m tests.simt.coverage

mutants: $(BUILT)
	$(BIN)/python -m tests.simt.mutants

# setup.py's flags, and a register or shared-memory spill is an error; so is a program for the emulator's cases on a GPU
# that does not compile.
cuda: $(TORCH)
ifeq ($(NVCC),)
	@echo "*** no nvcc found: the CUDA sources were NOT compiled ***"
else
	@$(NVCC) --version | tail -2 | head -1
	@mkdir -p build/cuda
	@includes=$$($(BIN)/python -c "from torch.utils import cpp_extension as e; print(*('-isystem=' + p for p in e.include_paths()))"); \
	printf '%s\n' csrc/cuda/*.cu | xargs -P 2 -I SOURCE bash -c 'name=$$(basename SOURCE .cu); \
	  echo "nvcc SOURCE: sm_80, sm_90"; \
	  $(NVCC) -std=c++17 -O3 --Werror=all-warnings -Xcompiler=-fvisibility=hidden,-Wall --resource-usage \
	    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -Icsrc '"$$includes"' \
	    -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -c SOURCE -o build/cuda/$$name.o \
	    > build/cuda/$$name.new 2>&1 || { cat build/cuda/$$name.new; exit 255; }; mv build/cuda/$$name.new build/cuda/$$name.log'
	@$(NVCC) -std=c++17 -O2 -arch=sm_90 --Werror=all-warnings -Icsrc -Itests/simt tests/simt/hardware.cu -o build/cuda/hardware
	@$(BIN)/python -m tests.resources build/cuda/*.log > build/cuda/resources.txt || { cat build/cuda/resources.txt; exit 1; }
	@tail -1 build/cuda/resources.txt
	@echo "registers, shared memory and spills of each: build/cuda/resources.txt"
endif

# With the machine's own python and torch; nothing is downloaded. QUICK=1 takes two minutes instead of nine.
gpu-check:
	@test -n "$(RESULTS)" || { echo "make gpu-check RESULTS=dir [QUICK=1]: the folder for the two result files"; exit 2; }
	$(PYTHON) -m benchmarks.gpu_check --results $(RESULTS) $(if $(QUICK),--quick)

wheel: $(BUILT)
	rm -rf dist/*.whl build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	ls -l dist/metafast-*-cp310-abi3-linux_$$(uname -m).whl
	$(call fresh_environment,build/env-wheel)
	build/env-wheel/bin/python $(INSTALL) dist/metafast-*.whl
	$(call try_environment,build/env-wheel)

sdist: $(BUILT)
	rm -rf dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist . > build/sdist.log 2>&1 || { cat build/sdist.log; exit 1; }
	ls -l dist/metafast-*.tar.gz
	$(call fresh_environment,build/env-sdist)
	build/env-sdist/bin/python $(INSTALL) $(BUILD_TOOLS)
	TORCH_CUDA_ARCH_LIST=9.0 build/env-sdist/bin/python $(INSTALL) --no-build-isolation dist/metafast-*.tar.gz
	$(call try_environment,build/env-sdist)

clean:
	rm -rf build dist metafast.egg-info metafast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(BUILT)

define fresh_environment
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python $(INSTALL) $(PIP_TORCH) torch==$(TORCH_VERSION)
endef

define try_environment
	$(1)/bin/python -I tests/installed.py
	$(1)/bin/metafast doctor
endef

$(TORCH):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=...")'
	@echo "setting up .venv with torch $(TORCH_VERSION)"
	@test -e $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(INSTALL) $(PIP_TORCH) torch==$(TORCH_VERSION)
	@$(BIN)/python $(INSTALL) $(BUILD_TOOLS)
	@touch $@

# The first build comes with the editable installation; later ones compile only what changed.
$(BUILT): $(TORCH) pyproject.toml setup.py $(CSRC)
	@if [ pyproject.toml -nt .venv/.installed ]; then \
	  echo "installing the development tools, building metafast"; \
	  $(BIN)/python $(INSTALL) --no-build-isolation -e '.[dev]' && touch .venv/.installed; \
	else \
	  echo "building metafast"; mkdir -p build; \
	  $(BIN)/python setup.py build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }; \
	fi
	@touch $@

$(OLDEST):
	@echo "setting up build/env-oldest with torch $(OLDEST_TORCH_VERSION)"
	@$(PYTHON) -m venv --clear build/env-oldest
	@build/env-oldest/bin/python $(INSTALL) $(PIP_TORCH) torch==$(OLDEST_TORCH_VERSION)
	@build/env-oldest/bin/python $(INSTALL) $(BUILD_TOOLS) pytest hypothesis
	@touch $@
