#!/usr/bin/env bash
# The steps of action.yml, which also run anywhere else: judge a checkout of candle-mi, and say what changed in it.
#   CANDLE_MI  the checkout         BASE   what to compare with: a revision, or a branch of origin (optional)
#   KNOWN      its file of expected divergences (optional)   CASES  globs over case ids (optional)
#   OUT        where reports go     PARITY_CACHE  emitters, truths, packages
# Exit code: that of `run`; 3 where something could not be measured, which is no pass.
set -euo pipefail
suite=$(cd "$(dirname "$0")/.." && pwd)
parity=$suite/.venv/bin/candle-mi-parity
: "${CANDLE_MI:?the checkout of candle-mi}" "${OUT:=parity}" "${PARITY_CACHE:=$HOME/.cache/candle-mi-parity}"
export PARITY_CACHE
mkdir -p "$OUT"
out=$(cd "$OUT" && pwd) tree=
rm -f "$out/comment.md"
[ -z "${KNOWN:-}" ] || [ -f "$CANDLE_MI/$KNOWN" ] || {
    echo "::error::candle-mi-parity: the file of expected divergences $KNOWN is not in $CANDLE_MI" >&2
    exit 2
}
"$suite/setup.sh" "$PARITY_CACHE"

globs=()
read -ra given <<<"${CASES:-}" # not expanded to the files of this directory
for glob in "${given[@]}"; do globs+=(--cases "$glob"); done

run=(--candidate "path:$CANDLE_MI" --out "$out/run")
[ -z "${KNOWN:-}" ] || run+=(--known "$CANDLE_MI/$KNOWN")
code=0
"$parity" run "${run[@]}" "${globs[@]}" || code=$?

# What a pull request is compared with: GitHub tests its merge, whose first parent is the base. The base branch itself may
# have moved on since, which would look as if the pull request took that back. A shallow clone hides the parents of a commit.
base_commit() {
    local wanted=$BASE shallow=()
    if [ "$BASE" = "${GITHUB_BASE_REF:-}" ] && [ "$(git rev-parse HEAD)" = "${GITHUB_SHA:-}" ]; then
        wanted=$(git cat-file commit HEAD | sed -n '/^$/q; s/^parent //p' | head -n 1)
    fi
    if ! git rev-parse --quiet --verify "$wanted^{commit}"; then
        # With a depth, fetch would make a whole clone shallow.
        [ "$(git rev-parse --is-shallow-repository)" = false ] || shallow=(--depth 1)
        git fetch --quiet "${shallow[@]}" origin "$wanted" && git rev-parse --verify 'FETCH_HEAD^{commit}'
    fi
}

remove_tree() { git -C "$CANDLE_MI" worktree remove --force "$tree" 2>/dev/null || rm -rf "$tree"; }

compare() {
    local base below ended=0
    base=$(cd "$CANDLE_MI" && base_commit) && below=$(git -C "$CANDLE_MI" rev-parse --show-prefix) || return 1
    # The same path in each run, which is in the key of its emitter.
    tree=$out/base
    remove_tree
    git -C "$CANDLE_MI" worktree prune
    trap remove_tree EXIT
    git -C "$CANDLE_MI" worktree add --quiet --detach "$tree" "$base" || return 1
    # 1: something got worse, which `run` has judged; 2: the base does not build, say, and there is nothing to compare.
    "$parity" diff "path:$tree/$below" "path:$CANDLE_MI" "${globs[@]}" --out "$out/diff" || ended=$?
    [ $ended -le 1 ] && cp "$out/diff/diff.md" "$out/comment.md" # empty where nothing changed
}

if [ -n "${BASE:-}" ]; then
    compare || echo "::warning::candle-mi-parity could not compare with $BASE"
    # A fork's pull request gets no comment: its token may not write one.
    [ ! -s "$out/comment.md" ] || [ -z "${GITHUB_STEP_SUMMARY:-}" ] || cat "$out/comment.md" >>"$GITHUB_STEP_SUMMARY"
fi
[ $code -ne 3 ] || echo "::error::candle-mi-parity could not measure everything, so that it says neither yes nor no: see the summary"
exit $code
