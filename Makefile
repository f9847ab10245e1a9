# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

ENGINES := .venv-engines

.PHONY: demo test test-slow test-ci nightly zoo soak test-engines check bench sanitize cross fuzz site lock clean

demo: $(VENV)/.demo
	$(BIN)/upq demo

# A worker a core; each takes tests from the other when it has none left.
PYTEST := -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal

SHORT := not gpu and not nightly and not soak and not zoo

test: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "$(SHORT) and not slow"

# What CI runs in addition.
test-slow: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "$(SHORT) and slow"

# Both at once: a worker spends half a minute on imports before its first test.
test-ci: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "$(SHORT)"

# What takes minutes: the zoo, the soak, the GPU's kernels in Triton's interpreter, whole files of the public tests, the
# wheel, the layouts of all types.
nightly: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "(nightly or zoo or soak) and not gpu"

# Whole runs of tiny models of every family: a quarter of an hour.
zoo: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "zoo and not gpu" tests/test_models.py tests/test_walker.py

# Killed at random moments, over and over.
soak: $(VENV)/.installed
	$(BIN)/python $(PYTEST) tests/faults -m "not gpu"

test-engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest tests/engines tests/test_exports*.py

check: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy --num-workers auto

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/stories.py --jobs 2
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/results.py

# The C++ of the kernels without Python, against double: here under sanitizers, then on another processor.
sanitize: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitize -DUPQ_TEST=ON -DUPQ_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize --parallel
	build/sanitize/kernels_test 40

# Debian: apt install g++-aarch64-linux-gnu qemu-user
cross: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/aarch64 -DUPQ_TEST=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/aarch64 --parallel
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/kernels_test 20

# 10 minutes in all; what it finds lies in build/fuzz/crashes and goes on failing with `tools/fuzz.py TARGET --input FILE`.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	for target in artifact recipe data inputs; do $(BIN)/python tools/fuzz.py $$target --seconds 150 || exit 1; done

# The documentation as pages, into build/site. A link that leads nowhere ends it.
site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A lock pins every package, and is of one platform and Python. Elsewhere constraints.txt pins what UPQ itself names.
PLATFORM := $(shell $(PYTHON) -c 'import platform, sys; print(sys.platform, platform.machine(), "py%d%d" % sys.version_info[:2], sep="-")')
LOCK := $(wildcard requirements/$(PLATFORM).txt)
ALL := eval,bench,report,browser,dev,export,serve,cuda
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(LOCK) $(wildcard src/upq/kernels/cpu/*)

# torch first and alone, through pip, which knows the indexes of pip.conf: a CPU build is chosen there, and left to itself
# the package index would give a CUDA build with gigabytes of libraries. uv fetches the rest side by side while the
# kernels compile; it reads no pip.conf, so `make UV= test` does all of it through pip.
UV ?= $(BIN)/uv
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "UPQ needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)")'
@echo "installing into $(VENV), versions of $(or $(LOCK),constraints.txt): 1. torch, 2. the kernels, compiled, and $(1)"
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch $(if $(UV),uv)
@wanted='--constraint constraints.txt $(addprefix --constraint ,$(LOCK)) --editable .[$(1)]'; \
	$(if $(UV),$(UV) pip install --python $(BIN)/python --build-constraints constraints.txt --reinstall-package upq $$wanted || \
	{ echo "uv could not install them (it reads no pip.conf): once more through pip"; false; } ||) \
	$(BIN)/python -m pip install --no-compile --quiet $$wanted
endef
comma := ,

# What `make demo` needs, and no more.
$(VENV)/.demo: $(SOURCES)
	$(call install,eval$(comma)report)
	@touch $@

$(VENV)/.installed: $(SOURCES)
	$(call install,$(ALL))
	@touch $(VENV)/.demo $@

# The lock of this platform and Python anew, from what constraints.txt and the package index give today.
lock:
	rm -rf $(VENV)
	$(MAKE) LOCK= $(VENV)/.installed
	mkdir -p requirements
	(echo "# What \`make test\` installs beside the CPU build of torch. Written by \`make lock\`."; \
		$(UV) pip freeze --python $(BIN)/python --exclude-editable | grep --invert-match --extended-regexp "^(torch|uv|pip|setuptools)==") \
		> requirements/$(PLATFORM).txt

# An environment of its own, since llama.cpp is built from source: minutes on a fast machine, an hour on two cores.
# humming-kernels without what it needs to run, a CUDA GPU: its descriptions of checkpoints are all that is used.
$(ENGINES)/.installed: pyproject.toml constraints.txt
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --upgrade pip
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps humming-kernels
	CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF" \
	$(ENGINES)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[bench,dev,export,phones,engines]"
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) demo runs build CMakeCache.txt CMakeFiles CMakeInit.txt cmake_install.cmake \
		build.ninja .ninja_* .cmake .skbuild-info.json *.a src/upq/kernels/*.so
