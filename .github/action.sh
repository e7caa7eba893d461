#!/usr/bin/env bash
# The steps of action.yml, which also run anywhere else: judge a checkout of candle-mi, and say what changed in it.
#   CANDLE_MI  the checkout         BASE   a git revision of it to compare with (optional)
#   KNOWN      its file of expected divergences (optional)   CASES  globs over case ids (optional)
#   OUT        where reports go     PARITY_CACHE  emitters, truths, packages
# Exit code: that of `run`, but 0 where something could not be measured, which a warning says.
set -euo pipefail
suite=$(cd "$(dirname "$0")/.." && pwd)
parity=$suite/.venv/bin/candle-mi-parity
: "${CANDLE_MI:?the checkout of candle-mi}" "${OUT:=parity}" "${PARITY_CACHE:=$HOME/.cache/candle-mi-parity}"
export PARITY_CACHE
"$suite/setup.sh" "$PARITY_CACHE"
mkdir -p "$OUT"
rm -f "$OUT/comment.md"

globs=()
for glob in ${CASES:-}; do globs+=(--cases "$glob"); done

run=(--candidate "path:$CANDLE_MI" --out "$OUT/run")
[ -z "${KNOWN:-}" ] || run+=(--known "$CANDLE_MI/$KNOWN")
code=0
"$parity" run "${run[@]}" "${globs[@]}" || code=$?

if [ -n "${BASE:-}" ]; then
    below=$(git -C "$CANDLE_MI" rev-parse --show-prefix)
    tree=$(mktemp -d)
    trap 'git -C "$CANDLE_MI" worktree remove --force "$tree/base"; rm -rf "$tree"' EXIT
    git -C "$CANDLE_MI" worktree add --quiet --detach "$tree/base" "$BASE"
    # 1: something got worse, which `run` has judged; 2: the base does not build, say, and there is nothing to compare.
    "$parity" diff "path:$tree/base/$below" "path:$CANDLE_MI" "${globs[@]}" --out "$OUT/diff" || [ $? -eq 1 ] ||
        echo "::warning::candle-mi-parity could not compare with $BASE"
    [ ! -s "$OUT/diff/diff.md" ] || cp "$OUT/diff/diff.md" "$OUT/comment.md"
fi
[ $code -ne 3 ] || { echo "::warning::candle-mi-parity could not measure everything: see the summary"; code=0; }
exit $code
