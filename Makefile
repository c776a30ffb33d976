# Two commands: `make demo` trains with our losses beside the built-in one, `make test` runs every check.
# Both create .venv first; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test check inner sanitize compilers matrix wheel wheel-test docs accuracy bench bench-head scaling figures gpu gpu-test \
  gpu-bench clean

demo: $(STAMP)
	$(BIN)/python -m softmax_ext
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target check sanitize-address,undefined sanitize-thread compilers
	$(BIN)/python -m softmax_ext
	$(BIN)/python -m pytest -n 2 --dist worksteal --doors torch,jax --cov --cov-report=term-missing:skip-covered --cov-fail-under=95
	$(MAKE) --no-print-directory wheel-test

# The static half of `make test`: style, types and pages.
check: $(STAMP) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The rows under the address, undefined-behaviour and thread sanitisers, on every instruction set of this CPU.
sanitize: $(STAMP)
	$(MAKE) --no-print-directory --jobs 2 sanitize-address,undefined sanitize-thread

# Both at once: the three instruction sets of one are no even share of two cores.
sanitize-%:
	$(BIN)/cmake -G "Unix Makefiles" -S . -B build/$* -DSOFTMAX_EXT_SANITIZE=$* --log-level=WARNING
	+$(BIN)/cmake --build build/$* -- --no-print-directory
	$(BIN)/ctest --test-dir build/$* --parallel 2 --output-on-failure

# One wheel for every Python: it has the doors whose frameworks .venv has, built with their headers.
wheel: $(STAMP)
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# The wheel in fresh environments with one framework or both. WHOLE=--whole: every test not marked slow, not only those
# of doors, rows and ops.
wheel-test: wheel
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target fresh-torch fresh-jax fresh-torch+jax

fresh-%:
	$(BIN)/python -m tests.fresh dist/*.whl $(subst +, ,$*) $(WHOLE)

# The wheel beside the oldest and newest frameworks and Tritons, the rows by Clang and on an emulated NEON; gigabytes are
# downloaded, an hour or so. MATRIX="--home FOLDER" keeps the environments, MATRIX="--debian trixie" adds its Python.
matrix: wheel
	$(BIN)/python -m tests.matrix dist/*.whl --page docs/machines.md $(MATRIX)

# The cheap half, of every `make test`: the rows by Clang, run, and for NEON, built; a line with the reason where the
# compilers are not installed.
compilers: $(STAMP)
	$(BIN)/python -m tests.matrix --only Clang NEON --no-emulator --home build/compilers

# The quick loop while editing: everything but the tests marked slow or long.
inner: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not long"

# Frameworks first and exactly pinned: a later package that asks for any torch then finds one.
# A compiler is found or not: without one the package installs and runs on plain framework ops.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard softmax_ext/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group frameworks
	$(BIN)/python -m pip install --quiet --group test --group demo --group integrations --group docs --group rivals --editable .
	touch $@

# Pages from docs/ and the docstrings, into build/docs; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Errors of every op and type, kept in benchmarks/results.
accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy

# Our ops beside the built-ins, and without options large results in fresh memory too; options:
# BENCH="--op softmax --shape 1024x32000", or BENCH=--help.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH)
	$(if $(BENCH),,$(BIN)/python -m benchmarks.fresh)

# A language model's head at full size, in minutes and 24 GiB: BENCH="--shape 820x2304@256000" takes a tenth of the time.
bench-head: $(STAMP)
	$(BIN)/python -m benchmarks.head_memory $(BENCH)

# How time and memory grow with N, V and D, on one core and on all; minutes on an idle machine.
scaling: $(STAMP)
	$(BIN)/python -m benchmarks.scaling $(BENCH)

# Tables and pictures of README and docs, from what the commands above have kept.
figures: $(STAMP)
	$(BIN)/python -m benchmarks.figures

# On a machine with a GPU: the device tests (at most 4 minutes), whatever they say the benchmark, and last its table.
# Installs nothing: $(PYTHON) is an interpreter that has PyTorch, Triton and pytest (and JAX), from the repository's root.
gpu:
	-timeout --signal=INT 240 $(MAKE) --no-print-directory gpu-test
	$(MAKE) --no-print-directory gpu-bench

gpu-test:
	$(PYTHON) -m softmax_ext
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -n 12 -q --tb=short tests/device

# Writes benchmarks/results/<device>.csv after every cell, the most telling first; lines of other parts stay. 7 minutes
# for all; less: BENCH="--part rows heads --minutes 3". --results FOLDER.
gpu-bench:
	$(PYTHON) -m benchmarks.gpu $(BENCH)

clean:
	rm -rf .venv build dist *.egg-info
