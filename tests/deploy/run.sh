#!/usr/bin/env bash
# The deployment tests: manifests against their schemas, then images and clusters on a real Docker engine. Needs root on Debian, or an
# engine that runs already.
#   tests/deploy/run.sh [TEST...]     names of functions of cluster.py, or "observability"; default: everything
# Where no engine answers, installs docker.io, docker-compose and debootstrap if missing and starts one of its own, which it ends
# again; its images stay in build/docker for the next time. No registry is used: the base image is made by debootstrap from the
# mirror that apt is configured with, and Redis, HAProxy and Prometheus come from Debian's packages. Exit status 77, with the reason in the
# last line: this machine's kernel or privileges allow no engine.
set -euo pipefail
cd "$(dirname "$0")/../.."
manifests= # process that checks them meanwhile; its faults count without an engine, too
skip() {
  [ -z "$manifests" ] || wait "$manifests" || { cat build/manifests.log; exit 1; }
  echo "skipped: $*"
  exit 77
}
began=$SECONDS
step() { printf -- '--- %s (%d s)\n' "$1" $((SECONDS - began)); }
find_program() { [ -x "/usr/bin/$1" ] && echo "/usr/bin/$1" || command -v "$1"; }

engine_pid= run_dir=
finish() {
  local status=$?
  if [ -n "$engine_pid" ]; then
    kill -TERM "$engine_pid" 2>/dev/null || true
    for _ in $(seq 200); do kill -0 "$engine_pid" 2>/dev/null || break; sleep 0.1; done
  fi
  [ -z "$run_dir" ] || rm -rf "$run_dir"
  exit "$status"
}
trap finish EXIT

check_manifests() {
  command -v kubectl >/dev/null || { echo "kubectl is missing (Debian: kubernetes-client)"; exit 1; }
  /usr/bin/python3 tests/deploy/manifests.py
}

install_packages() {
  local missing=() p
  for p in docker.io docker-compose debootstrap iptables $(command -v kubectl >/dev/null || echo kubernetes-client); do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; made=1; fi
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  local status=$?
  [ -z "$made" ] || rm -f "$policy"
  return $status
}

start_engine() {
  [ "$(id -u)" -eq 0 ] || skip "no Docker engine answers, and only root could start one"
  command -v apt-get >/dev/null || skip "no Docker engine answers, and there is no apt-get to install one"
  install_packages >build/docker-packages.log 2>&1 || skip "Docker's packages could not be installed: $(tail -1 build/docker-packages.log)"
  run_dir=$(mktemp -d /tmp/moesaic-docker-XXXXXX)
  mkdir -p build/docker
  export DOCKER_HOST=unix://$run_dir/docker.sock
  dockerd --host "$DOCKER_HOST" --data-root "$PWD/build/docker" --exec-root "$run_dir/exec" --pidfile "$run_dir/pid" \
    >build/dockerd.log 2>&1 &
  engine_pid=$!
  for _ in $(seq 300); do
    "$(find_program docker)" info >/dev/null 2>&1 && return 0
    kill -0 "$engine_pid" 2>/dev/null || break
    sleep 0.1
  done
  skip "dockerd does not start here: $(grep -E 'level=(fatal|error)|failed' build/dockerd.log | tail -1)"
}

# An engine that answers may still be refused containers (namespaces, cgroups, mounts).
run_a_container() {
  local told
  told=$("$DOCKER" run --rm "$base" true 2>&1) || skip "the Docker engine cannot run a container here: $(tail -1 <<<"$told")"
}

# debian:bookworm-slim as debootstrap makes it, with apt's sources and proxy of this machine.
make_base_image() {
  local root
  command -v debootstrap >/dev/null || skip "debootstrap is missing, and no base image is there"
  root=$(mktemp -d /tmp/moesaic-base-XXXXXX)
  chmod 755 "$root"
  apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' |
    awk '$4 == "Debian" && $2 ~ /^bookworm/ { print "deb", $1, $2, $3 }' | sort -u >"$root.sources"
  local mirror; mirror=$(awk '$3 == "bookworm" { print $2; exit }' "$root.sources")
  [ -n "$mirror" ] || skip "apt has no Debian 12 mirror to make the base image from"
  debootstrap --variant=minbase bookworm "$root" "$mirror" >build/debootstrap.log 2>&1
  cp "$root.sources" "$root/etc/apt/sources.list"
  apt-config dump | grep -iE '^Acquire::(http|https)::proxy ' >"$root/etc/apt/apt.conf.d/99proxy" || rm -f "$root/etc/apt/apt.conf.d/99proxy"
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man,info} "$root"/var/log/*
  tar -C "$root" -c . | "$DOCKER" import - "$1" >/dev/null
  rm -rf "$root" "$root.sources"
}

build_image() { # DOCKERFILE CONTEXT TARGET TAG [MORE...]
  local log="build/image-$4.log"
  DOCKER_BUILDKIT=1 "$DOCKER" build --build-arg "DEBIAN_IMAGE=$base" -f "$1" --target "$3" -t "$4" "${@:5}" "$2" >"$log" 2>&1 ||
    { tail -40 "$log"; echo "the image $4 could not be built"; exit 1; }
}

mkdir -p build
command -v kubectl >/dev/null || [ "$(id -u)" -ne 0 ] || install_packages >build/docker-packages.log 2>&1 || true
if [ $# -eq 0 ]; then check_manifests >build/manifests.log 2>&1 & manifests=$!; fi
DOCKER=$(find_program docker || true)
if [ -z "$DOCKER" ] || ! "$DOCKER" info >/dev/null 2>&1; then step "Docker engine"; start_engine; fi
DOCKER=$(find_program docker)
export DOCKER PATH="$(dirname "$DOCKER"):$PATH"
if "$DOCKER" compose version >/dev/null 2>&1; then COMPOSE="$DOCKER compose"
elif command -v docker-compose >/dev/null; then COMPOSE=$(command -v docker-compose)
else skip "neither 'docker compose' nor docker-compose is installed"; fi
export COMPOSE

base=debian:bookworm-slim
step "base image"
"$DOCKER" image inspect "$base" >/dev/null 2>&1 || make_base_image "$base"
run_a_container
step "images"
for target in redis haproxy prometheus stranger; do
  build_image tests/deploy/images/Dockerfile tests/deploy/images "$target" "moesaic-test-$target"
done &
others=$!
build_image deploy/docker/Dockerfile . cli moesaic
for target in router worker; do build_image deploy/docker/Dockerfile . "$target" "moesaic-$target"; done
wait "$others"
for image in moesaic-router moesaic-worker moesaic; do
  bytes=$("$DOCKER" image inspect -f '{{.Size}}' "$image")
  echo "figure: deploy: image $image: $((bytes / 1000000)) MB"
  [ "$bytes" -le 150000000 ] || { echo "FAIL the image $image is larger than 150 MB"; exit 1; }
done
alerts_of_written_series() {
  "$DOCKER" run --rm --network none --entrypoint promtool -v "$PWD/deploy/prometheus/rules.yml:/etc/prometheus/rules.yml:ro" \
    -v "$PWD/tests/deploy/rules_test.yml:/rules_test.yml:ro" moesaic-test-prometheus test rules /rules_test.yml
}
# Dockerfile.cuda without CUDA's images, which no mirror of Debian has: it is read, and with --full all of it is built but what wants nvcc.
cuda_image() {
  DOCKER_BUILDKIT=1 "$DOCKER" build -f deploy/docker/Dockerfile.cuda --target none . >build/image-cuda.log 2>&1 || true
  grep -qE 'failed to reach build target|target stage "?none"? could not be found' build/image-cuda.log ||
    { tail -20 build/image-cuda.log; echo "FAIL Dockerfile.cuda cannot be read"; exit 1; }
  [ "${MOESAIC_TEST_FULL:-0}" = 1 ] || return 0
  build_image deploy/docker/Dockerfile . tools moesaic-test-tools
  build_image deploy/docker/Dockerfile.cuda . cli moesaic-test-cuda --build-arg CUDA_BUILD_IMAGE=moesaic-test-tools \
    --build-arg "CUDA_IMAGE=$base" --build-arg MOESAIC_CUDA=OFF
  "$DOCKER" run --rm --network none moesaic-test-cuda --help >/dev/null
}

status=0
if [ -n "$manifests" ]; then
  step "manifests"
  wait "$manifests" || status=1
  cat build/manifests.log
fi
if [ $# -eq 0 ]; then
  step "image of Dockerfile.cuda"
  cuda_image
  step "alerts of written series"
  alerts_of_written_series
  step "cluster"
  /usr/bin/python3 tests/deploy/cluster.py || status=1
fi
if [ $# -eq 0 ] || [ "$1" = observability ]; then
  step "observability"
  /usr/bin/python3 tests/deploy/observability.py || status=1
else
  step "cluster"
  /usr/bin/python3 tests/deploy/cluster.py "$@" || status=1
fi
step "end"
exit $status
