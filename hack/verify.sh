#!/usr/bin/env bash
# Fails if something that is generated is not what the sources make it, or if the sources are not tidy. Leaves the generated files up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make --no-print-directory generate manifests
generated=(api config/crd/bases config/rbac/role.yaml docs/configuration.md)
git diff --exit-code -- "${generated[@]}" || { echo "verify: generated files were out of date; they are up to date now: commit them" >&2; exit 1; }
untracked=$(git ls-files --others --exclude-standard -- "${generated[@]}")
[ -z "$untracked" ] || { echo "verify: generated files are not committed: $untracked" >&2; exit 1; }

unformatted=$(git ls-files -z '*.go' | xargs -0 gofmt -l)
[ -z "$unformatted" ] || { echo "verify: not formatted, run make fmt: $unformatted" >&2; exit 1; }

go mod tidy -diff || { echo "verify: go.mod or go.sum is not tidy, run go mod tidy" >&2; exit 1; }
go -C test/oracle mod tidy -diff || { echo "verify: test/oracle/go.mod or go.sum is not tidy, run go -C test/oracle mod tidy" >&2; exit 1; }
go mod verify >/dev/null || { echo "verify: the module cache does not match go.sum" >&2; exit 1; }
