#!/usr/bin/env bash
# Runs the tests of one kind (see packages.sh):
#
#   test.sh KIND [go test flag...]
#
# Environment: CI, if set, makes a skipped test a failure. KUBEBUILDER_ASSETS: see tools/kubernetes/build.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:?kind of tests: unit, envtest, netns or e2e}
shift
mapfile -t packages < <(hack/packages.sh "$kind")
[ ${#packages[@]} -gt 0 ] || { echo "no package has $kind tests" >&2; exit 1; }
modules=() # tests that are modules of their own

flags=()
case $kind in
  unit) modules=(test/oracle) ;;
  # Go cannot see what these read (programs, manifests, the kernel), so it must not remember their results.
  envtest)
    # They wait a good part of their time, for an API server or for a time to be over, so one more than there are processors run side by side. Those that
    # take longest come first, because nothing is left to run beside the last one.
    flags+=(-count=1 -timeout=15m "-p=$(($(nproc) + 1))")
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | awk '/\/(controllers|cmd\/controller)$/ { print; next } { rest = rest $0 "\n" } END { printf "%s", rest }')
    ;;
  netns | e2e)
    flags+=(-count=1 -timeout=20m -p=1) # side by side they would measure and disturb one another
    if [ "$(id -u)" -ne 0 ]; then
      if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        flags+=(-exec "sudo --preserve-env=PATH,HOME,CI,KUBEBUILDER_ASSETS,BACKENDTEST_RECORDS,PARITY_CACHE,GOFLAGS,GOCACHE,GOMODCACHE")
      else
        echo "$kind tests make network namespaces and need root: without it they are skipped. Run this as root, or let sudo work without a password." >&2
      fi
    fi
    ;;
esac
if [ "$kind" != unit ]; then
  KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)
  export KUBEBUILDER_ASSETS
  # envtest waits for 20s. kube-apiserver takes longer on a machine that is busy, and one that comes too late is left behind.
  export KUBEBUILDER_CONTROLPLANE_START_TIMEOUT=${KUBEBUILDER_CONTROLPLANE_START_TIMEOUT:-2m}
fi

report=$(mktemp)
BACKENDTEST_RECORDS=$(mktemp -d) # where test/parity, which comes later, finds what backends' tests found
export BACKENDTEST_RECORDS
# Where test/parity keeps what it finds of kube-proxy, for as long as nothing that it follows from changes.
PARITY_CACHE=${PARITY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/serviceproxy-operator/parity}
export PARITY_CACHE
trap 'rm -rf "$report" "$BACKENDTEST_RECORDS"' EXIT
go build -o "$report" ./hack/testreport # not `go run`, which would hide the exit status
echo "--- $kind tests ($((${#packages[@]} + ${#modules[@]})) packages)"
run() { # all tests of the kind; fails if one of the commands does
  local failed=0 module
  go test -json "${flags[@]}" "$@" "${packages[@]}" || failed=1
  for module in "${modules[@]}"; do
    go -C "$module" test -json "${flags[@]}" "$@" ./... || failed=1
  done
  return "$failed"
}
set +e
run "$@" | "$report" ${CI:+-no-skips}
status=("${PIPESTATUS[@]}")
# A test binary's failure is in the report too. Both are looked at, so that neither can be lost.
[ "${status[0]}" -eq 0 ] && [ "${status[1]}" -eq 0 ]
