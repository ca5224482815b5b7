# make demo: set up and train the digits. make test: set up and run tests, lint and types. make check: the same of the core alone,
# while one works on it. make sanitize: kernels under sanitizers. make results: tables and curves of the docs from results/.
# make notebook: the outputs in examples/*.ipynb.
# make gpu: what a GPU is worth most for, in 25 minutes; again, and it goes on.
PYTHON ?= python3
VENV ?= .venv
# Where pip finds builds of torch without CUDA, if not in its usual index: see "Install" in the README.
TORCH_INDEX ?=
PIP_OPTIONS = --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN = $(VENV)/bin/

.PHONY: demo test check results notebook gpu lint types unit sanitize format clean

demo: $(VENV)/.train
	$(RUN)dnw train digits

test: lint types unit

CORE = averages checkpoints copies edges floors graphs house in_place kinds_of_steps layout optimizers parameters parametrized \
	public rules rules_and_papers select stats steps wiring writes

check: lint types
	$(RUN)pytest -q -n auto --dist loadgroup $(CORE:%=tests/test_%.py)

unit: $(VENV)/.dev
	$(RUN)pytest -q -n auto --dist loadgroup

sanitize: $(VENV)/.dev
	VENV=$(VENV) bash tests/sanitize.sh

results: $(VENV)/.dev
	for folder in results/*; do \
	  $(RUN)dnw results $$folder --into docs/results.md --table $$(basename $$folder) || exit 1; \
	done
	$(RUN)dnw results results/chain_20 --plot docs/learning_curves.svg
	$(RUN)dnw results results/arena_tiny results/chain_5 results/chain_20 --plot docs/arena.svg --differences

notebook: $(VENV)/.dev
	$(RUN)python tests/notebook.py examples/digits.ipynb

gpu: $(VENV)/.dev
	PYTHON=$(RUN)python bash benchmarks/gpu.sh

lint: $(VENV)/.dev
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: $(VENV)/.dev
	$(RUN)mypy

format: $(VENV)/.dev
	$(RUN)ruff check --fix .
	$(RUN)ruff format .
	if command -v clang-format >/dev/null; then clang-format -i src/dnw/*/*.[ch]; fi

$(VENV)/.train: pyproject.toml constraints.txt
	test -x $(RUN)pip || $(PYTHON) -m venv $(VENV)
	$(RUN)pip install $(PIP_OPTIONS) -e '.[train]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(RUN)pip || $(PYTHON) -m venv $(VENV)
	$(RUN)pip install $(PIP_OPTIONS) -e '.[dev]'
	$(RUN)pip install $(PIP_OPTIONS) --no-deps --target $(VENV)/torchvision torchvision timm  # aside: see tests/conftest.py
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
