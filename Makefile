# Every target is a line or two; the work is in .ci/setup, dvc.yaml and the modules named here.
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup data demo test lint docs bench doctor clean

setup: ## venv, pinned packages, the pydensecrf build, a self-check
	@.ci/setup
	@$(PY) -m stages.doctor --quiet

data: setup ## draws the embedded data set
	@$(PY) -m pipeline.datasets.scenes.dataset data/raw/scenes

demo: data ## the whole pipeline on drawn scenes, and a table of its figures
	dvc repro
	@$(PY) -m pipeline.report.summary audit

test: setup lint docs ## everything that CI runs
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	ruff check .
	ruff format --check .
	lint-imports
	pyright

docs: setup ## the site of docs/ into site/; fails where a link or an anchor is dead
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

bench: setup ## speed and memory, as ratios against a reference in the same run
	$(PY) -m benchmarks.run

doctor: setup ## what is there, and what to do where something is missing
	@$(PY) -m stages.doctor

clean: ## unfinished work and caches of tools; results and .venv stay
	rm -rf .work .pytest_cache .ruff_cache .hypothesis
