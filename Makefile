# From a fresh clone: `make demo`. Every target does the set-up it needs; nothing is done twice.

PYTHON ?= python3
PY     := .venv/bin/python
READY  := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(READY)  ## build .venv, fetch the demo model and data
	@$(PY) examples/fetch_assets.py --quiet

demo: setup  ## select and train on real data, on CPU or GPU
	@echo "the demo: SmolLM2-135M fine-tuned on rows that LESS picks, and on random rows; 3 to 6 minutes on two CPU cores"
	.venv/bin/dataflex dynamic examples/demo.yaml --overwrite
	.venv/bin/dataflex dynamic examples/demo.yaml --overwrite component_name=random output_dir=saves/demo-random report=false
	.venv/bin/dataflex report saves/demo --against saves/demo-random
	@echo "look at the page: saves/demo/report.html, in a browser"
	@echo "ask the model: $(PY) examples/ask.py saves/demo 'What is the capital of France?'"
	@echo "your own data: source .venv/bin/activate (or write .venv/bin/dataflex), then as README.md says"

test: setup  ## run the tests
	$(PY) -m pytest -n 2 --dist loadfile --durations=20

test-gpu: setup  ## run the tests that need a GPU
	TEST_GPU=1 $(PY) -m pytest tests/gpu

lint: $(READY)  ## ruff: rules and format; mypy: types, strict (pyproject.toml says of what)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup  ## gradients against LoRA training on this machine
	.venv/bin/dataflex bench examples/demo.yaml

clean:  ## remove .venv and what builds, tests and runs wrote; keep data/ and models/
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis saves models/.converting-*
	find dataflex commands examples tests -name __pycache__ -prune -exec rm -rf {} +
	@echo "kept data/ and models/, which take a download to make again; delete them by hand if you mean to"

# Older than either file means: something to install anew. The stamp comes last, so a set-up that was
# cut off is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "dataflex needs Python 3.11 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	        "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "installing dataflex and its requirements into .venv (once; torch alone takes a while)"
	@$(PY) -m pip uninstall --quiet --yes dataflex 2>/dev/null  # the name of an earlier checkout, or of another project
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,deepspeed]' -c constraints.txt
	@touch $@
