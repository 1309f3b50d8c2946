# make demo     the library at work; results in runs/demo
# make test     lint, types, tests
# Each target first installs what it needs into $(VENV), and again only after pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= runs/demo
PYTEST_ARGS ?=

BIN := $(VENV)/bin

# $(call or_advise,TEXT): after a failed command, say what to do and keep its exit status. TEXT holds no comma.
or_advise = || { status=$$?; echo "make: $(1)" >&2; exit $$status; }

CHECK_PYTHON = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	$(call or_advise,'$(PYTHON)' is not Python 3.10 or newer; name one that is: make $(MAKECMDGOALS) PYTHON=python3.12)
CREATE = "$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)" \
	$(call or_advise,could not create $(VENV); Debian and Ubuntu need: apt install python3-venv)
INSTALL = "$(BIN)/python" -m pip install --disable-pip-version-check -e ".[$*]" \
	$(call or_advise,the installation into $(VENV) failed (pip says why above). It needs a package index and 6 GB of disk. Run the same command again or start afresh: rm -rf $(VENV))
LINT = "$(BIN)/python" -m ruff check . \
	$(call or_advise,lint found the lines above; '$(BIN)/python -m ruff check --fix .' mends what it can)
TYPES = "$(BIN)/python" -m mypy \
	$(call or_advise,the type checker found the lines above; mend them and run 'make types')
# Report pages are opened in Chromium where there is one.
BROWSER := $(or $(CONTLEARN_CHROMIUM),$(shell command -v chromium || command -v chromium-browser || command -v google-chrome))
WITHOUT_BROWSER := $(if $(BROWSER),,-m "not browser")
TESTS = "$(BIN)/python" -m pytest $(WITHOUT_BROWSER) $(PYTEST_ARGS) \
	$(call or_advise,tests failed; again from the first failure: make test PYTEST_ARGS='--lf -x')
DEMO = "$(BIN)/python" -m contlearn.demo --out "$(DEMO_OUT)" \
	$(call or_advise,the demo stopped; '$(BIN)/python -m contlearn.doctor' names what is missing)
DOCS = "$(BIN)/python" -m mkdocs build --strict --site-dir site \
	$(call or_advise,the documentation did not build; mend the pages named above)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs clean

help:
	@sed -n 's/^# make /make /p' Makefile
	@echo 'make lint | types | docs | clean'
	@echo 'variables: VENV=DIR PYTHON=PROGRAM DEMO_OUT=DIR PYTEST_ARGS="-k name"'

# The stamp of one extra; dev contains demo, so it stamps both.
$(VENV)/.installed-%: pyproject.toml
	@$(CHECK_PYTHON)
	@echo "make: installing contlearn[$*] into $(VENV); this takes some minutes the first time"
	@$(CREATE)
	@$(INSTALL)
	@touch "$@" $(if $(filter dev,$*),"$(VENV)/.installed-demo")

demo: $(VENV)/.installed-demo
	@$(DEMO)

test: $(VENV)/.installed-dev
	@$(LINT)
	@$(TYPES)
	@$(if $(BROWSER),:,echo "make: no Chromium found: leaving out the tests that open report pages in it")
	@$(TESTS)

lint: $(VENV)/.installed-dev
	@$(LINT)

types: $(VENV)/.installed-dev
	@$(TYPES)

docs: $(VENV)/.installed-docs
	@$(DOCS)

# Generated files only: the environment takes minutes to rebuild, and runs/ holds results.
clean:
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -type d \( -path ./.git -o -path './$(VENV)' \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "make: kept $(VENV) and runs/; remove them by hand where wanted"
