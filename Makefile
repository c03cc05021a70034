# Ringleader: the commands that people type. `make help` lists them.
CARGO ?= cargo
PYTHON ?= python3
ARGS ?=
REFERENCE ?= tests/reference

.PHONY: help run-cluster build test test-long check compare clean

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

test-long: ## the tests of rebalancing and durability in their full size
	RINGLEADER_LONG=1 $(CARGO) test --release --test rebalancing --test durability -- --nocapture

check: ## format, lints and tests: what CI runs
	bash .ci/run

compare: ## the original's scripts and ours side by side (REFERENCE=DIR PYTHON=python3)
	RINGLEADER_COMPARE="$(abspath $(REFERENCE))" PYTHON="$(PYTHON)" $(CARGO) test --test compare -- --nocapture comparison

clean: ## remove what was built
	$(CARGO) clean
