# make book · make test · make serve: each sets up .venv by itself. `make help` lists everything.

PYTHON ?= python3
PORT ?= 8000
ARGS ?=
VERSIONS ?= newest
RECORDS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
PARITY := .venv/.installed-parity
FUZZ := .venv/.installed-fuzz
BROWSER := .venv/.installed-browser

# The outputs in the notebooks are a CPU's.
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help book serve free-port test test-core browser colab versions badges parity network-test fuzz
.PHONY: kernel-records portability bench chapter api format lint clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

book: $(INSTALLED) ## build the HTML, warnings as errors, and check it
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	$(BIN)/python scripts/check_html.py
	@echo "The book: $(CURDIR)/_build/html/index.html"

serve: free-port book ## build the HTML and serve it on this machine (PORT=8000)
	@echo "Serving at http://127.0.0.1:$(PORT)/ (stop with Ctrl-C)"
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

free-port: # before the book is built, and not after
	@$(PYTHON) -c 'import socket, sys; \
		taken = socket.socket().connect_ex(("127.0.0.1", $(PORT))) == 0; \
		sys.exit(taken and "port $(PORT) is taken: make serve PORT=8001")'

test: $(INSTALLED) ## the module's tests and every cell of every notebook (ARGS="-k scan")
	$(BIN)/pytest --nbval -n 2 --dist loadfile $(ARGS)

test-core: $(INSTALLED) ## the tests of the core alone, without notebooks (about a minute)
	$(BIN)/pytest -n 2 tests/test_*.py $(ARGS)

browser: $(BROWSER) ## read the built book in Chromium, which must be there (after make book)
	@test -f _build/html/book/index.html || { echo "there is no book to read: make book"; exit 2; }
	$(BIN)/pytest -m browser tests/browser -n 2 --dist loadfile $(ARGS)

parity: $(PARITY) ## compare with transformers' PyTorch Mamba (installs PyTorch)
	$(BIN)/pytest -m parity tests $(ARGS)

network-test: $(INSTALLED) ## compare with the published outputs of the published weights
	$(BIN)/pytest -m network tests $(ARGS)

kernel-records: $(INSTALLED) ## compare with recorded outputs of Mamba-3's kernels (RECORDS=folder)
	@test -n "$(RECORDS)" || echo "no RECORDS=folder given: see tests/test_kernel_records.py for the public files"
	RECORDS="$(RECORDS)" $(BIN)/pytest -m kernel_records -rs tests $(ARGS)

fuzz: $(FUZZ) ## search for weights files that break the readers (installs atheris)
	@set -e; for target in bin pickle safetensors; do echo "$$target"; \
		$(BIN)/python scripts/fuzz_checkpoint.py $$target -max_total_time=120 $(ARGS); done

portability: $(INSTALLED) ## the notebooks again, as on a CPU without wide vector instructions
	XLA_FLAGS=--xla_cpu_max_isa=SSE4_2 $(BIN)/pytest --nbval -n 2 --dist loadfile book

colab: $(INSTALLED) ## the notebooks as Colab runs them, from an empty folder (ARGS="03_selective_scan")
	$(BIN)/python scripts/rehearse_colab.py $(ARGS)

versions: ## the tests with the newest packages, or the oldest admitted ones (VERSIONS=oldest)
	$(PYTHON) -m venv --clear .venv-$(VERSIONS)
	.venv-$(VERSIONS)/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$(VERSIONS)/bin/uv pip install --quiet --python .venv-$(VERSIONS)/bin/python -e ".[book,test]" \
		--resolution $(if $(filter oldest,$(VERSIONS)),lowest-direct,highest)
	.venv-$(VERSIONS)/bin/pytest --nbval -n 2 --dist loadfile --junitxml _build/$(VERSIONS).xml $(ARGS)

badges: ## a badge per chapter, from what make versions found
	.venv-$(VERSIONS)/bin/python scripts/badges.py _build/$(VERSIONS).xml _build/badges

bench: $(INSTALLED) ## run the benchmarks (but kernel_records.py, which needs a folder)
	@set -e; for file in $(filter-out %/kernel_records.py,$(wildcard benchmarks/[a-z]*.py)); do \
		echo "$$file"; $(BIN)/python "$$file" $(ARGS); done

chapter: $(INSTALLED) ## execute a chapter, write it in canonical form (N=3, N=verification)
	@test -n "$(N)" || { echo "which chapter? make chapter N=3"; exit 2; }
	@found=$$(ls book/$(N).ipynb book/$(N)_*.ipynb book/0$(N)_*.ipynb 2>/dev/null); \
	test -n "$$found" || { echo "there is no chapter $(N) in book/"; exit 2; }; \
	echo "executing $$found (a minute or two)"; $(BIN)/python book/run.py $$found

api: $(INSTALLED) ## write book/api.md, the list of all public names
	$(BIN)/python scripts/make_api.py

format: $(INSTALLED) ## lay out the Python files and mend what ruff can mend
	$(BIN)/ruff check --fix --extend-exclude '*.ipynb' .
	$(BIN)/ruff format .

lint: $(INSTALLED) ## ruff, and the form of the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python book/run.py --check

clean: ## remove what was built; .venv stays
	rm -rf _build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mamba mamba_book tests book scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

$(PARITY): $(INSTALLED) requirements-parity.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-parity.txt -c constraints.txt
	@touch $@

$(BROWSER): $(INSTALLED) requirements-browser.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt -c constraints.txt
	@touch $@

$(FUZZ): $(INSTALLED) requirements-fuzz.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-fuzz.txt -c constraints.txt
	@touch $@
