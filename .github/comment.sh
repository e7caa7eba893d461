#!/usr/bin/env bash
# Keep the one comment of action.yml on a pull request: made when something changed, edited by later runs, and also when
# nothing differs any longer.
#   comment.sh NUMBER FILE    FILE: the text; empty where nothing changed, absent where nothing was compared
set -euo pipefail
number=$1 file=$2
[ -e "$file" ] || exit 0
mark="<!-- candle-mi-parity -->"
comments=repos/$GITHUB_REPOSITORY/issues
body=$(mktemp)
trap 'rm -f "$body"' EXIT

keep() {
    # Another workflow comments under the same name, so that the last comment may be its own.
    local id
    id=$(gh api --paginate "$comments/$number/comments" --jq ".[] | select(.body | startswith(\"$mark\")) | .id") || return
    id=${id%%$'\n'*}
    if [ -s "$file" ]; then
        { echo "$mark" && cat "$file"; } >"$body"
    elif [ -n "$id" ]; then
        printf '%s\nNo number or outcome differs from the base any longer.\n' "$mark" >"$body"
    else
        return 0
    fi
    if [ -n "$id" ]; then
        gh api --silent --method PATCH "$comments/comments/$id" --field "body=@$body"
    else
        gh api --silent --method POST "$comments/$number/comments" --field "body=@$body"
    fi
}

keep || echo "::warning::no comment: the workflow needs pull-requests: write, which a fork's pull request has not"
