# Two commands on a fresh machine; each does its own set-up.
#   make parity   is candle-mi right?  (CANDIDATE=0.2.2 | path:DIR | git:URL@REV | stored:VERSION)
#   make test     is this suite right? lint, types, Rust, and every test
#   make bench    what does it cost? times and memory as ratios, exit 1 when a figure is missed
CANDIDATE ?= 0.2.2
CACHE := $(or $(PARITY_CACHE),$(HOME)/.cache/candle-mi-parity)
PY := .venv/bin/python
CARGO := CARGO_TARGET_DIR="$(CACHE)/target/candle-0.11" cargo
CRATE := --release --locked --manifest-path emitter/Cargo.toml

.PHONY: parity test bench lint rust-lint setup

parity: setup
	@.venv/bin/candle-mi-parity run --candidate "$(CANDIDATE)"

test: lint rust-lint
	$(PY) -m pytest --require-rust -n auto --dist loadgroup

bench: setup
	@$(PY) -m proof.bench

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

setup:
	@./setup.sh "$(CACHE)"
