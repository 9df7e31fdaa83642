# make demo | make test | make notebooks: set up .venv with pinned versions, then run.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint notebooks clean

demo: $(VENV)/ready
	$(RUN) -m fastinstance demo

test: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --level error
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

notebooks: $(VENV)/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	$(RUN) notebooks/execute.py

$(VENV)/ready: pyproject.toml constraints.txt tests/no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps --requirement tests/no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) dist
