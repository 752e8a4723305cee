#!/usr/bin/env bash
# Prints the packages whose tests are of one kind:
#
#   e2e       those below test/e2e: they start whole clusters
#   netns     those that make network namespaces and need root
#   envtest   those that start an API server
#   unit      all others that have tests
#
# A package's kind follows from what its tests import, so that nobody has to keep lists, tags or names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:?kind of tests: unit, envtest, netns or e2e}
module=$(go list -m)

go list -test -f '{{if eq .Name "main"}}{{.ImportPath}} {{join .Deps " "}}{{end}}' ./... | awk -v want="$kind" -v module="$module" '
  $1 !~ /\.test$/ { next }
  {
    package = substr($1, 1, length($1) - length(".test")); deps = " " $0 " "
    if (index(package, module "/test/e2e") == 1) kind = "e2e"
    else if (index(deps, " " module "/test/netns ") || index(deps, " " module "/test/cluster ") || package == module "/test/netns") kind = "netns"
    else if (index(deps, " sigs.k8s.io/controller-runtime/pkg/envtest ")) kind = "envtest"
    else kind = "unit"
    if (kind == want) print package
  }'
