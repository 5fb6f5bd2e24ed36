# Every target installs what it needs into .venv first, so each works as the first command in a fresh clone.
PYTHON ?= python3
IMAGE ?= cat.jpg
ARGS ?=
BIN := .venv/bin

.PHONY: help setup demo train infer test coverage mutants fuzz figures bench lint clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16

setup: .venv/installed ## install minivit and what it needs into .venv

demo: setup ## tell the whole story on drawings, without network, into runs/demo
	$(BIN)/python -m minivit demo $(ARGS)

train: setup ## fine-tune blocks 10-11 of google/vit-base-patch16-224 on Oxford-IIIT Pet (ARGS="--epochs 10")
	$(BIN)/python train.py $(ARGS)

infer: setup ## name what is in a photo and draw where blocks 8-11 look (IMAGE=cat.jpg)
	$(BIN)/python infer.py $(ARGS) "$(IMAGE)"

test: .venv/installed-dev ## hold every output against transformers', offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

coverage: export COVERAGE_FILE = $(CURDIR)/.cache/coverage/data
coverage: .venv/installed-dev ## say which lines and branches no test comes by, child processes included
	mkdir -p .cache/coverage && rm -f .cache/coverage/*
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile $(ARGS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered -m

mutants: .venv/installed-dev ## break the code in 150 small ways, and see whether a test notices (ARGS="--seed 1")
	$(BIN)/python tests/mutate.py $(ARGS)

fuzz: .venv/installed-dev ## open 20,000 broken photos, for ten minutes at most (ARGS="--seed 1")
	$(BIN)/python tests/test_fuzz.py --cases 20000 --minutes 10 $(ARGS)

figures: .venv/installed-dev ## make the figures of README.md and docs/ again, from what `make demo` leaves and benchmarks measured
	$(BIN)/python benchmarks/figures.py $(ARGS)

bench: .venv/installed-dev ## measure speed on this machine's CPU, against transformers (ARGS="--train 3680 --test 3669")
	$(BIN)/python benchmarks/finetune.py --device cpu --train 20 --test 20 --runs 1 --no-record \
		--only transformers,transformers-even,minivit-cold,minivit-views1 $(ARGS)

lint: .venv/installed-dev ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32

clean: ## remove .venv and caches; runs/, data/ and attention/ stay
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minivit needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; use make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	@touch $@
