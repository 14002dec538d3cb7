# ServingTiers: what you can do here. `make help` is the map.
SHELL := /bin/bash
PYTHON ?= python3
# Processes of a run of tests. More than cores, because many tests wait; too many, and those that measure time fail.
JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this map
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  \033[1m%-22s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- set-up ----------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(STAMP) ## Make .venv with the locked dependencies; .venv/bin/servingtiers is the command

$(STAMP): requirements/dev.txt pyproject.toml
	@echo "==> making $(VENV) with the locked dependencies (about a minute the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("Python 3.11 or newer is needed: make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: lock
lock: ## Resolve the dependencies anew into requirements/
	$(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv
	build/lock/bin/uv pip compile --quiet pyproject.toml --all-extras --group test --group lint --group build --group e2e --universal \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements/dev.txt
	build/lock/bin/uv pip compile --quiet pyproject.toml --universal -c requirements/dev.txt \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements/operator.txt
	build/lock/bin/uv pip compile --quiet --group build --universal -c requirements/dev.txt \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements/build.txt

# -- the two commands ------------------------------------------------------------------------------------------

.PHONY: demo
demo: setup ## Three tiers on a real API server with simulated engines under replayed traffic (KEEP=1: leave it up)
	@$(BIN)/servingtiers demo $(if $(KEEP),--keep)

.PHONY: control-plane
control-plane: setup ## Fetch or build the control plane's binaries (cached)
	@$(BIN)/python -m servingtiers.lab.binaries

.PHONY: helm
helm: setup ## Fetch or build Helm and kubeconform, for the chart's tests (cached)
	@$(BIN)/python -m servingtiers.lab.go_programs

COMPILED := $(VENV)/.compiled
PREDICT := $(BIN)/servingtiers predict --model meta-llama/Llama-3.1-8B-Instruct --accelerator h100-sxm-80gb --requests 200

$(COMPILED): $(STAMP) operator/servingtiers/performance/engine_kernel.py operator/servingtiers/simulate/plant.py
	@echo "==> compiling the event engines, once for all processes of the tests"
	@$(PREDICT) --rate 1 >/dev/null
	@$(PREDICT) --concurrency 4 >/dev/null
	@$(BIN)/servingtiers simulate --trace step:1:2:300 --tier manifests/examples/balanced.yaml --no-clairvoyant >/dev/null
	@touch $@

# Dozens of Python processes start in a run: they read compiled modules, also where others are told not to write them.
test test-properties test-crash: export PYTHONDONTWRITEBYTECODE :=

.PHONY: test
test: setup control-plane helm $(COMPILED) ## The default suite: pure tests and the API-server ring
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

# -- checks ----------------------------------------------------------------------------------------------------

.PHONY: lint
lint: setup ## Formatting, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: setup ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: generate
generate: setup ## Write everything that is generated from code: CRD, references, chart parts, manifests, golden objects
	@$(BIN)/servingtiers crds --output-dir crds --reference docs/reference/api.md
	@$(BIN)/python charts/generate.py
	@$(BIN)/python -m servingtiers.performance.rules_of_thumb docs/explanation/rules-of-thumb.md
	@$(BIN)/python -m servingtiers.performance.catalogue_page docs/reference/catalogue.md
	@UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/render/test_golden.py

.PHONY: verify-generated
verify-generated: setup ## Fail where a generated file is out of step
	@$(BIN)/servingtiers crds --output-dir crds --reference docs/reference/api.md --check
	@$(BIN)/python charts/generate.py --check
	@$(BIN)/python tests/tools/same.py docs/explanation/rules-of-thumb.md -- \
	  $(BIN)/python -m servingtiers.performance.rules_of_thumb
	@$(BIN)/python tests/tools/same.py docs/reference/catalogue.md -- \
	  $(BIN)/python -m servingtiers.performance.catalogue_page

# -- longer rings ----------------------------------------------------------------------------------------------

.PHONY: test-properties
test-properties: setup ## Search at random for counter-examples to the properties: ten times the examples, others each time
	@HYPOTHESIS_EXPLORE=1 $(BIN)/python -m pytest -n $(JOBS) -m "hypothesis and not slow and not ring"

.PHONY: test-crash
test-crash: setup control-plane ## SIGKILL the operator after every write of a create, a scale, a spec change and a delete
	@$(BIN)/python -m pytest -s -m slow tests/ring

.PHONY: bench
bench: bench-reconcile bench-model ## All benchmarks but the autoscaler study

.PHONY: bench-reconcile
bench-reconcile: setup control-plane ## 100 and 300 tiers at once, then five idle minutes (about 13 minutes)
	@$(BIN)/python tests/bench/bench_reconcile.py

.PHONY: bench-model
bench-model: setup ## Accuracy and speed of the performance model; each criterion with its verdict at the end
	@mkdir -p build && set -o pipefail && for part in tables roofline analytic engine inferencex plans properties; do \
	  echo; echo "=== $$part"; $(BIN)/python tests/bench/bench_$$part.py || exit 1; done | tee build/bench-model.txt
	@echo; echo "=== every criterion"; grep '^criterion: ' build/bench-model.txt

.PHONY: bench-autoscaler
bench-autoscaler: setup ## The autoscaler study, quick form (FULL=1: the whole grid, hours)
	@$(BIN)/python tests/bench/bench_autoscaler.py $(if $(FULL),--full)

-include e2e/e2e.mk
