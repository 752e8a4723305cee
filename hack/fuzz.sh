#!/usr/bin/env bash
# Runs every fuzz target for FUZZTIME (default 30s), one after the other: go fuzzes one target at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
found=0
while IFS=: read -r file target; do
  found=1
  echo "--- $target ($(dirname "$file"))"
  # In the folder of the package, because some are modules of their own.
  go -C "$(dirname "$file")" test -run='^$' -fuzz="^$target\$" -fuzztime="${FUZZTIME:-30s}" .
done < <(git ls-files '*_test.go' | xargs grep -oE '^func Fuzz[A-Za-z0-9_]*' | sed 's/func //')
[ "$found" -eq 1 ] || { echo "there is no fuzz target" >&2; exit 1; }
