# Ringleader: the commands that people type. `make help` lists them.
CARGO ?= cargo
PYTHON ?= python3
ARGS ?=
REFERENCE ?= tests/reference

SEEDS ?= 1000
SEED ?=
START ?= 0
MUTANT ?=
SECONDS ?= 60
ONLY ?=
WRITE ?=

.PHONY: help run-cluster build test test-long sim sim-drift mutants chaos lock-experiment fuzz model bench bench-check check compare clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || \
	 sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1  \2/p' $(MAKEFILE_LIST)

run-cluster: ## build everything and run a cluster on this machine (ARGS="--servers 7")
	$(CARGO) build --release --bins
	target/release/cluster $(ARGS)

build: ## build the programs
	$(CARGO) build --release --bins

test: ## run every test
	$(CARGO) test

test-long: ## the tests of rebalancing, durability and the file system in their full size
	RINGLEADER_LONG=1 $(CARGO) test --release --test rebalancing --test durability -- --nocapture
	RINGLEADER_LONG=1 $(CARGO) test --release --test gfs_machines --test gfs --test gfs_masters -- --nocapture --test-threads 1

sim: ## run the simulator (SEEDS=1000 START=0), or one seed with its trace (SEED=17)
	$(CARGO) run --quiet --release --example sim -- $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first $(START))

sim-drift: ## the same with clocks that drift more than leases allow for: shows what breaks
	$(CARGO) run --quiet --release --example sim -- --drift $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first $(START))

mutants: ## deliberate bugs, and with how many seeds the simulator finds each (MUTANT=part-of-a-name,another)
	MUTANT="$(MUTANT)" $(CARGO) test --release --test mutants -- --ignored --nocapture

chaos: ## the real programs under random faults, judged (SECONDS=600 SEED=7)
	$(CARGO) build --release --bins --example chaos
	target/release/examples/chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

lock-experiment: ## a counter under a lock, and clients that sleep; with tokens and without (SECONDS=600)
	$(CARGO) build --release --bins --example lock_experiment
	target/release/examples/lock_experiment --seconds $(SECONDS) --tokens
	target/release/examples/lock_experiment --seconds $(SECONDS)

fuzz: ## bytes from elsewhere, so many seconds for each target (SECONDS=60)
	FUZZ_SECONDS=$(SECONDS) $(CARGO) test --test fuzz -- --nocapture

model: ## every order of events in a model of the protocol: some minutes
	$(CARGO) test --release --test model -- --nocapture --include-ignored --test-threads 1

bench: ## this project beside Redis, etcd and MooseFS: some 40 minutes (ONLY=name WRITE=1)
	$(CARGO) build --release --bins --example bench
	target/release/examples/bench $(if $(ONLY),--only $(ONLY) $(if $(WRITE),--write),--write)

bench-check: ## a quick run, which fails if it falls short of docs/benchmarks.md
	$(CARGO) build --release --bins --example bench
	target/release/examples/bench --check --rounds 3 --turn 2

check: ## format, lints and tests: what CI runs
	bash .ci/run

compare: ## the original's scripts and ours side by side (REFERENCE=DIR PYTHON=python3)
	RINGLEADER_COMPARE="$(abspath $(REFERENCE))" PYTHON="$(PYTHON)" $(CARGO) test --test compare -- --nocapture comparison

clean: ## remove what was built
	$(CARGO) clean
