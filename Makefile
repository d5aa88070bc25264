# make demo | test | lint | bench | bench-quick: each sets up what it needs. Wants python3 (3.11 or 3.12), make and a package registry.

# The first Python that is new enough, not too new, and can make virtual environments (Debian splits that off).
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' >/dev/null 2>&1 \
  && { echo "$$python"; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Root on Debian gets what is missing; anybody else works with what is there.
APT_INSTALL := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
# The tests' S3 server; start-up and stand-in are in tests/s3_server.py.
S3_PACKAGES := radosgw ceph-mon ceph-osd ceph-common
# What the tests read sidecars with.
EXIF_PACKAGES := libimage-exiftool-perl
# What they look at the report with.
BROWSER_PACKAGES := chromium
# What they make networks with, for clusters of several nodes: tests/machines.py.
NETWORK_PACKAGES := iproute2

.PHONY: demo test lint bench bench-quick wheel docs clean
.DEFAULT_GOAL := demo

demo: .venv/installed-demo
	@$(BIN)/python jobs/demo.py

# Two files at a time: much of a test of Ray is waiting for Ray.
test: .venv/installed-all
	@command -v radosgw >/dev/null || { $(APT_INSTALL) $(S3_PACKAGES) >/dev/null </dev/null; } || true
	@command -v exiftool >/dev/null || { $(APT_INSTALL) $(EXIF_PACKAGES) >/dev/null </dev/null; } || true
	@command -v chromium >/dev/null || { $(APT_INSTALL) $(BROWSER_PACKAGES) >/dev/null </dev/null; } || true
	@command -v ip >/dev/null || { $(APT_INSTALL) $(NETWORK_PACKAGES) >/dev/null </dev/null; } || true
	@$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make bench PHOTOS=/folder measures on photos of yours.
bench: .venv/installed-all
	@$(BIN)/python -m benchmarks.pipeline $(if $(PHOTOS),--library $(PHOTOS))

# The ratios that a change may break, in under five minutes; fails where one is.
bench-quick: .venv/installed-all
	@$(BIN)/python -m benchmarks.quick

# What cluster.yaml copies to every node.
wheel: .venv/installed-demo
	@rm -rf dist && $(PIP) wheel -q --no-deps -w dist . && cp constraints.txt dist/ && ls dist

# The documentation, as pages: docs/_build/html/index.html. Fails where a link within it is broken.
docs: .venv/installed-all
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html && echo docs/_build/html/index.html

# Everything made here but the environment itself (rm -rf .venv for that).
clean:
	rm -rf build dist demo out docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	@[ -n "$(PYTHON)" ] || { echo "PicInspector needs Python 3.11 or 3.12 with venv (Debian: apt-get install python3-venv); \
found $$(python3 --version 2>&1). Name another with: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed-demo: EXTRAS := demo
.venv/installed-all: EXTRAS := bench,critic,demo,dev,raw,train
.venv/installed-demo .venv/installed-all: .venv/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'import lightgbm' 2>/dev/null || { $(APT_INSTALL) libgomp1 >/dev/null </dev/null; } || \
	  { echo "LightGBM cannot be loaded: it needs the OpenMP library (Debian: apt-get install libgomp1)" >&2; exit 1; }
	@touch $@ $(if $(findstring all,$@),.venv/installed-demo)
