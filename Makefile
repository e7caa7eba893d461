# Two commands on a fresh machine; each does its own set-up.
#   make parity   is candle-mi right?  (CANDIDATE=0.2.2 | path:DIR | git:URL@REV | stored:VERSION)
#   make test     is this suite right? lint, types, Rust, and every test
# Proof, into build/proof:
#   make faults   what does it see? planted faults and the smallest doses; SOURCE=1: faults in candle-mi's own source
#   make alarms   does it cry wolf? honest variants of the arithmetic, none of which may be past the gate
#   make rivals   how do the rules that people use today do on the same dumps?
#   make fuzz     what do hostile files do? a hundred thousand mutants, none of which may pass, crash or hang
#   make bench    what does it cost? times and memory as ratios, exit 1 when a figure is missed
#   make fullsize the size of Gemma 2 2B with generated weights: seconds and peak memory of each stage
# Every night, into build/nightly:
#   make nightly  release and git main, the GPU, the hub; what changed since last night (STEPS='gpu-*', GATHERED=1)
# Records, checked by the tests:
#   make licences the licence of every crate and package, into docs/licences.md; needs the crates of every release
CANDIDATE ?= 0.2.2
CACHE := $(or $(PARITY_CACHE),$(HOME)/.cache/candle-mi-parity)
PY := .venv/bin/python
CARGO := CARGO_TARGET_DIR="$(CACHE)/target/candle-0.11" cargo
CRATE := --release --locked --manifest-path emitter/Cargo.toml

.PHONY: parity test pytest nightly faults alarms rivals fuzz bench fullsize licences lint rust-lint setup

parity: setup
	@.venv/bin/candle-mi-parity run --candidate "$(CANDIDATE)"

test: lint rust-lint pytest

pytest: setup
	$(PY) -m pytest --require-rust -n auto --dist loadgroup

STEPS ?= *
nightly: setup
	@.venv/bin/candle-mi-parity nightly --steps "$(STEPS)" $(if $(GATHERED),--gathered)

faults: setup
	@$(PY) -m proof.faults $(if $(SOURCE),--source)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command as main; main()"

rust-lint: setup
	cargo fmt --check --manifest-path emitter/Cargo.toml
	@touch emitter/build.rs emitter/src/*.rs # a shared target directory tells clones apart by time alone
	$(CARGO) clippy $(CRATE) --all-targets -- -D warnings
	$(CARGO) test --quiet $(CRATE)

alarms: setup
	$(PY) -m proof.alarms

RIVALS := build/rivals
# A package that does not install is listed as not run. Their dependencies are the suite's own.
rivals: setup
	@python3 -m venv $(RIVALS)/pip
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["rivals"])' \
		| xargs -n 1 $(RIVALS)/pip/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RIVALS)/site || true
	PYTHONPATH=$(RIVALS)/site $(PY) -m proof.rivals

fuzz: setup
	@$(PY) -m proof.fuzz

bench: setup
	@$(PY) -m proof.bench

licences: setup
	@$(PY) -m proof.licences

fullsize: setup
	@$(PY) -m proof.fullsize --candidate "$(CANDIDATE)"

setup:
	@./setup.sh "$(CACHE)"
