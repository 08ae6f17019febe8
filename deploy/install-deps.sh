#!/usr/bin/env bash
# Installs the Debian packages that Moesaic needs and that are missing (Debian 12; root or sudo).
#   deploy/install-deps.sh          to build and run
#   deploy/install-deps.sh --tests  also what the tests use
set -euo pipefail
packages=(
  gcc cmake ninja-build pkg-config protobuf-c-compiler protobuf-compiler
  libzmq3-dev libprotobuf-c-dev libhiredis-dev libevent-dev libjansson-dev libpcre2-dev libutf8proc-dev libyaml-dev libssl-dev
  redis-server curl ca-certificates
)
[ "${1:-}" = --tests ] && packages+=(clang libclang-rt-14-dev libcmocka-dev openssl python3 python3-jinja2 python3-yaml npm git)

missing=()
for p in "${packages[@]}"; do
  # npm is left alone where a Node.js of another origin brings its own
  if [ "$p" = npm ] && command -v npm >/dev/null; then continue; fi
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

sudo=
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "install-deps: these packages are missing, and neither root nor sudo is at hand: ${missing[*]}" >&2; exit 1; }
  sudo=sudo
fi
echo "install-deps: installing ${missing[*]}" >&2
# A service started by the package would hold port 6379; Moesaic starts a private Redis of its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
  $sudo chmod +x "$policy"
  trap '$sudo rm -f "$policy"' EXIT
fi
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
