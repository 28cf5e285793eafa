# Every target makes its own .venv where it is missing or older than pyproject.toml, with plain pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: demo test check bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("se-prune needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP) ## the main job on the bundled network and data
	$(BIN)/se-prune demo

test: $(STAMP) ## every test that needs no GPU
	$(BIN)/python -m pytest

check: $(STAMP) ## lint, format, types and the fast tests
	$(BIN)/ruff check se_prune cli tests reports
	$(BIN)/ruff format --check se_prune cli tests reports
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow'

bench: $(STAMP) ## the studies behind reports/ (hours; resumable)
	$(BIN)/python -m reports.bench

clean:
	rm -rf $(VENV) dist build demo-out runs
