# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint benchmark examples model-types clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## profile, plan, train and report on three emulated devices
	$(BIN)/colledge demo

test: install ## the whole test suite; tests/multiproc first, so that no long file is left to the end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: install ## step time against PyTorch's own parallelism
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engine.py

examples: install ## the examples' profiles and plans, and what docs/plan.md quotes of them
	for name in home factory; do \
	  $(BIN)/colledge profile examples/$$name/run.yaml && $(BIN)/colledge plan examples/$$name/run.yaml || exit 1; \
	done
	$(BIN)/python docs/quotes.py

model-types: install ## which causal model types of transformers train exactly: docs/model-types.md
	$(BIN)/python docs/model_types.py

clean:
	rm -rf $(VENV) demo out
