#!/usr/bin/env bash
# Installs the Debian packages that the tests and the demo need, and only those that are missing.
set -euo pipefail

# What is called, and the package that has it.
declare -A package=(
  [git]=git [ip]=iproute2 [nft]=nftables [iptables]=iptables [conntrack]=conntrack [modprobe]=kmod [sysctl]=procps [curl]=curl
)
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps them, and ordinary users do not look

missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
command -v go >/dev/null || { echo "setup: there is no go in PATH. Install Go 1.26 or newer from https://go.dev/dl/." >&2; exit 1; }
[ ${#missing[@]} -gt 0 ] || exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort)
if ! command -v apt-get >/dev/null; then
  echo "setup: missing: ${missing[*]} (Debian's names). This is no Debian: install them in this system's way." >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "setup: missing: ${missing[*]}. Run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null
apt-get install -qq -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
