# make lab    sets up .venv and opens JupyterLab on the first tutorial   (ARGS="--no-browser --port 8899")
# make test   sets up .venv and runs every check; each step is a target of its own
# make notebooks    runs all notebooks and stores their outputs
# CPU=1       installs PyTorch from its CPU wheels: a much smaller download

PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; done)
INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
BIN := .venv/bin
READY := .venv/.ready
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: lab test notebooks lint types contracts unit notebooks-test browser

lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(firstword $(sort $(wildcard notebooks/*.ipynb))) $(ARGS)

test: lint types contracts unit notebooks-test browser
.NOTPARALLEL:

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

contracts: $(READY)
	$(BIN)/lint-imports

unit: $(READY)
	$(ONE_THREAD) $(BIN)/pytest -n 2 --dist loadfile -m "not browser"

notebooks-test: $(READY)
	$(if $(wildcard notebooks/*.ipynb),$(ONE_THREAD) $(BIN)/pytest --nbval notebooks --nbval-sanitize-with tests/nbval_sanitize.cfg)

# runs every notebook and stores its outputs, without widget state: what a reader sees before running anything
notebooks: $(READY)
	$(ONE_THREAD) $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False notebooks/*.ipynb

browser: $(READY)
	$(if $(wildcard tests/browser/test_*.py),$(ONE_THREAD) $(BIN)/pytest -m browser tests/browser)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qlab needs Python 3.11 or newer as python3 on PATH; none was found. Install it and run make again."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(INDEX) --editable ".[dev]" --constraint constraints.txt
	@touch $@
