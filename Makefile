# Everything a reader needs: `make book` and `make test`. Each target sets up .venv when it is missing or requirements changed.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
            $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: book test check fuzz lab bench clean
.DEFAULT_GOAL := book

book: $(VENV)/.user
	$(BIN)/cxrkit book

# Pages show about 85 characters of code, so notebooks have a file of rules of their own.
NOTEBOOKS = $$(find notebooks -name '*.ipynb' -not -path '*/.*')
define LINT
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/ruff check --config ruff-notebooks.toml $(NOTEBOOKS)
$(BIN)/ruff format --check --config ruff-notebooks.toml $(NOTEBOOKS)
endef

# A file's tests stay together, in the order of tests/conftest.py. The book is built among them, and nbval compares what its
# notebooks then say.
SPREAD = -n auto --dist loadfile --no-loadscope-reorder

test: $(VENV)/.developer
	$(LINT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) tests

# Lint, and the tests of the parts that changed since the last commit.
check: $(VENV)/.developer
	$(LINT)
	@tests=$$($(BIN)/python tests/changed.py); test -z "$$tests" || OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) $$tests

lab: $(VENV)/.user
	$(BIN)/jupyter lab --notebook-dir . --LabApp.news_url=None \
	    --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate notebooks/start.ipynb

# Random networks under every method, against slow oracles; other seeds are as good: make fuzz NETWORKS=100 SEED=5000
NETWORKS ?= 3000
SEED     ?= 0
fuzz: $(VENV)/.developer
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz --networks $(NETWORKS) --seed $(SEED)

bench: $(VENV)/.developer
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf _build results .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "cxrkit needs Python 3.11 or 3.12; none was found. Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(VENV)/bin/python requirements.txt pyproject.toml jupyter/cxrkit.json
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@printf '%s\n' '$(CURDIR)' '$(CURDIR)/notebooks' > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/cxrkit-checkout.pth
	@touch $@

$(VENV)/.developer: $(VENV)/.user requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@
