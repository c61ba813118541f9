# make lab    sets up .venv and opens JupyterLab on the first tutorial   (ARGS="--no-browser --port 8899")
# make test   sets up .venv and runs every check; each step is a target of its own
# make docs   builds the guide into site/, strictly
# make notebooks    runs all notebooks and stores their outputs
# make benchmark    measures what is not measured yet and prints the table   (SETS="digits resnet18", ARGS=--again)
# make benchmark-aimet    the same for AIMET, in an environment of its own, .aimet
# make binder       installs what Binder is told to, in an environment of its own, and runs the tour there; CI does so too
# CPU=1       installs PyTorch from its CPU wheels: a much smaller download

PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; done)
BINDER_PYTHON = $(shell wanted=$$(sed s/-// binder/runtime.txt); $$wanted -c '' >/dev/null 2>&1 && echo $$wanted || echo $(PYTHON))
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
INDEX := $(if $(CPU),$(CPU_INDEX))
BIN := .venv/bin
READY := .venv/.ready
ONE_THREAD := OMP_NUM_THREADS=1
OFFLINE := PYTHONPATH=tests/notebooks/offline
NBVAL := QLAB_BARS=0 $(OFFLINE) $(ONE_THREAD)
NBVAL_OPTIONS := --nbval-sanitize-with tests/nbval_sanitize.cfg

.PHONY: lab test notebooks lint types contracts unit docs notebooks-test browser binder benchmark benchmark-aimet

lab: $(READY)
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(firstword $(sort $(wildcard notebooks/*.ipynb))) $(ARGS)

test: lint types contracts unit docs notebooks-test browser
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

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(OFFLINE) $(BIN)/mkdocs build --strict --quiet

# every notebook, its outputs compared, with networking refused
notebooks-test: $(READY)
	$(NBVAL) $(BIN)/pytest --nbval notebooks $(NBVAL_OPTIONS)

# runs every notebook and stores its outputs, without widget state: what a reader sees before running anything
notebooks: $(READY)
	$(BIN)/python tests/notebooks/refresh.py

browser: $(READY)
	$(if $(wildcard tests/browser/test_*.py),$(ONE_THREAD) $(BIN)/pytest -m browser tests/browser)

# the steps of binder/, in a fresh environment of the Python that Binder takes (another where it is missing): no CUDA in
# it, nothing that qlab needs is lacking, the job in a terminal and the notebook that Binder opens run
binder:
	rm -rf .binder
	$(BINDER_PYTHON) -m venv .binder
	PIP_RETRIES=1 .binder/bin/python -m pip install --quiet --requirement binder/requirements.txt
	PATH="$(CURDIR)/.binder/bin:$$PATH" bash binder/postBuild
	.binder/bin/python -m pip check
	! .binder/bin/python -m pip list | grep -i nvidia
	.binder/bin/qlab --version
	$(ONE_THREAD) .binder/bin/python -m qlab.examples
	.binder/bin/python -m pip install --quiet nbval --constraint constraints.txt
	$(NBVAL) .binder/bin/python -m pytest -c /dev/null --rootdir . --nbval notebooks/00_tour.ipynb $(NBVAL_OPTIONS)

benchmark: $(READY)
	$(BIN)/python -m benchmarks $(SETS) $(ARGS)

# AIMET without torchvision, which it asks for names only and which is not built for every torch (benchmarks/aimet.py)
AIMET := 2.42.0
AIMET_NEEDS := Jinja2 PyYAML "bokeh>=3.3,<=3.6.3" cvxpy holoviews hvplot jsonschema matplotlib networkx numpy onnx \
	onnx_ir onnxscript osqp pandas psutil pybind11 safetensors scikit-learn scipy tensorboard tqdm

benchmark-aimet: .aimet/.ready
	PYTHONPATH=. $(ONE_THREAD) .aimet/bin/python -m benchmarks.aimet $(SETS) $(ARGS)
	$(if $(wildcard $(READY)),$(BIN)/python -m benchmarks --show)

.aimet/.ready:
	rm -rf .aimet
	$(PYTHON) -m venv .aimet
	.aimet/bin/python -m pip install $(CPU_INDEX) $$(grep ^torch== constraints.txt) $(AIMET_NEEDS)
	.aimet/bin/python -m pip install --no-deps aimet-torch==$(AIMET)
	@touch $@

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "qlab needs Python 3.11 or newer as python3 on PATH; none was found. Install it and run make again."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(INDEX) --editable ".[dev]" --constraint constraints.txt
	@touch $@
