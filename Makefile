# The developer's menu. `make help` lists it; everything makes its own environment in .venv.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest

help:  ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "(kit): needs the engine kit beside the checkout, $(KIT)"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "making the environment in .venv (once; PyTorch is the large part) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job: 16 ranks, 3 dispatchers, round robin beside minimum tokens (under 2 minutes once installed)
	@$(BIN)/balancer demo $(ARGS)

test: $(READY) lint  ## the quick tests: unit, property, e2e, serve (under 15 minutes)
	$(PYTEST) tests/unit tests/property tests/e2e tests/serve/quick $(ARGS)

lint: $(READY)  ## ruff and the strict type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(READY)  ## kill, pause and partition real processes; says how long recovery took
	$(PYTEST) tests/chaos -rA $(ARGS)

# A rig beside the checkout may know how to start an engine on a machine that has none, and to supply its images.
RIG := ../shared/docker-rig/up
test-docker: $(READY)  ## tests in containers: networks cut, servers killed, failovers (under 10 minutes)
	@test ! -x $(RIG) || $(RIG) --all
	$(PYTEST) tests/integration -s $(ARGS)

test-serve: $(READY)  ## balancer serve: others' load generators, a replica killed, 10,000 idle connections
	$(PYTEST) tests/serve/slow -s $(ARGS)

soak: $(READY)  ## a million random operations against the oracle (ARGS="--operations N --seed N")
	$(BIN)/python -m tests.property.soak $(ARGS)

bench: $(READY)  ## speed as ratios in one run, JSON in out/bench.json
	$(BIN)/python -m tests.bench $(ARGS)

# Verbs that name a real engine need the kit beside the checkout, which installs and serves engines without a GPU;
# ENGINES_HOME says where to.
KIT := ../shared/engines
export ENGINES_HOME ?= $(HOME)/.cache/engines
sglang-ready: $(READY)
	@test -x $(KIT)/sglang/install || { echo "no engine kit at $(KIT): real engines are started with it"; exit 1; }
	@$(KIT)/sglang/install
	@$(ENGINES_HOME)/sglang/bin/pip install --quiet --disable-pip-version-check --editable .

vllm-ready: $(READY)
	@test -x $(KIT)/vllm/install || { echo "no engine kit at $(KIT): real engines are started with it"; exit 1; }
	@$(KIT)/vllm/install
	@$(ENGINES_HOME)/vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable .

test-engines: test-sglang test-vllm  ## (kit) the plugins and balancer serve with real engines
	$(PYTEST) tests/serve/engines -s $(ARGS)

test-sglang: sglang-ready  ## (kit) in real SGLang, on the CPU (DPB_SGLANG_FORMS, DPB_SGLANG_RELEASES choose less)
	$(PYTEST) tests/engines/sglang --ignore tests/engines/sglang/test_pd.py -s $(ARGS)

test-sglang-pd: sglang-ready  ## (kit) prefill and decode on SGLangs of their own (DPB_MOONCAKE=FOLDER with Mooncake in it)
	DPB_MOONCAKE=$(DPB_MOONCAKE) $(PYTEST) tests/engines/sglang/test_pd.py -s $(ARGS)

test-vllm: vllm-ready  ## (kit) in real vLLM, its GPU simulated (ARGS="-k test_scheduler" is the slim form)
	$(PYTEST) tests/engines/vllm -s $(ARGS)

bench-serve: $(READY)  ## balancer serve beside sglang-router and smg on the same stub engines; JSON in out/
	$(BIN)/python -m tests.bench.serve.peers $(ARGS)

bench-sglang: sglang-ready  ## (kit) the seed's table on a real SGLang: round robin beside minimum tokens
	@$(BIN)/python -m tests.bench.sglang $(ARGS)

bench-vllm: vllm-ready  ## (kit) the pool beside vLLM's own balancer, and what the plugin costs; JSON in out/
	$(BIN)/python -m tests.bench.vllm_balance $(ARGS)
	$(BIN)/python -m tests.bench.vllm_throughput

clean:  ## remove the environment and what tools left behind
	rm -rf .venv out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help demo test lint chaos test-docker test-serve soak bench sglang-ready vllm-ready test-engines test-sglang test-sglang-pd test-vllm
.PHONY: bench-serve bench-sglang bench-vllm clean
