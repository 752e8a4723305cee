#!/usr/bin/env bash
# Builds the Kubernetes programs of the tests and the demo (etcd, kube-apiserver, kube-controller-manager, kube-proxy, kubectl) once and
# prints the folder that holds them. Later calls, and other checkouts at the same versions, find them there: the folder's name is a hash of
# what goes into them.
#
#   build.sh [PROGRAM...]      default: all of them
#
# Environment: KUBEBUILDER_ASSETS, if set, is used as it is and nothing is built.
#              SERVICEPROXY_TOOLS_DIR overrides where built programs are kept (default: the user's cache folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
programs=("$@")
[ ${#programs[@]} -gt 0 ] || programs=(etcd kube-apiserver kube-controller-manager kube-proxy kubectl)

if [ -n "${KUBEBUILDER_ASSETS:-}" ]; then
  missing=()
  for p in "${programs[@]}"; do [ -x "$KUBEBUILDER_ASSETS/$p" ] || missing+=("$p"); done
  if [ ${#missing[@]} -gt 0 ]; then
    echo "KUBEBUILDER_ASSETS=$KUBEBUILDER_ASSETS lacks: ${missing[*]}. Add them, or unset it and they are built from source." >&2
    exit 1
  fi
  echo "$KUBEBUILDER_ASSETS"
  exit 0
fi

version_of() { # MODULE: the version that go.mod requires
  awk -v module="$1" '$1 == module && $2 ~ /^v/ { print $2; found = 1 } END { exit !found }' "$here/go.mod" ||
    { echo "$here/go.mod requires no $1" >&2 && return 1; }
}
version=$(version_of k8s.io/kubernetes)
etcd_version=$(version_of go.etcd.io/etcd/server/v3)
key=$(cat "$here/go.mod" "$here/go.sum" | sha256sum | cut -c1-12)
out="${SERVICEPROXY_TOOLS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/serviceproxy-operator}/kubernetes-$version-$key"
mkdir -p "$out"

exec 9>"$out/.lock"
flock 9 # two builds side by side would do the work twice
for p in "${programs[@]}"; do
  [ -x "$out/$p" ] && continue
  case $p in
    etcd) pkg=go.etcd.io/etcd/server/v3 what="etcd $etcd_version" ;;
    *) pkg=k8s.io/kubernetes/cmd/$p what="$p $version" ;;
  esac
  echo "building $what (once; up to some minutes on a cold build cache) ..." >&2
  start=$SECONDS
  # Without a version stamp the API server believes to be v0.0.0 and switches its features off accordingly.
  (cd "$here" && CGO_ENABLED=0 GOWORK=off GOFLAGS=-buildvcs=false go build -trimpath -o "$out/.$p.tmp" \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version -X k8s.io/client-go/pkg/version.gitVersion=$version" "$pkg") >&2
  mv "$out/.$p.tmp" "$out/$p"
  echo "built $what in $((SECONDS - start)) s" >&2
done
echo "$out"
