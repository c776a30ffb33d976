# Two commands: `make demo` trains with our loss beside the built-in one, `make test` runs every check.
# Both create .venv first; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test check inner accuracy bench gpu gpu-test gpu-bench clean

demo: $(STAMP)
	$(BIN)/python -m softmax_ext
	$(BIN)/python -m examples.demo

test: $(STAMP) check
	$(BIN)/python -m softmax_ext
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

# The static half of `make test`: style and types.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The quick loop while editing: everything but the tests marked slow.
inner: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q -m "not slow"

# Frameworks first and exactly pinned: a later package that asks for any torch then finds one.
# A compiler is found or not: without one the package installs and runs on plain framework ops.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard softmax_ext/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group frameworks
	$(BIN)/python -m pip install --quiet --group test --group demo --editable .
	touch $@

# The accuracy table of the README.
accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy

# Our ops beside the built-ins; arguments: BENCH="--rounds 21 --shapes 1024x32000".
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH)

# On a machine with a GPU: the device tests and the benchmark, about 10 minutes each. Installs nothing: $(PYTHON) is
# an interpreter that has PyTorch, Triton and pytest (and JAX), from the repository's root.
gpu: gpu-test gpu-bench

gpu-test:
	$(PYTHON) -m softmax_ext
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -n 4 tests/test_device.py

# Writes benchmarks/results/<device>.csv.
gpu-bench:
	$(PYTHON) -m benchmarks.gpu $(BENCH)

clean:
	rm -rf .venv build dist *.egg-info
