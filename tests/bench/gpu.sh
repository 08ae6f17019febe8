#!/usr/bin/env bash
# What a GPU host shows, in the repository root: `tests/bench/gpu.sh test` builds and runs the GPU tests and the sanitizers. Under
# 9 minutes. The build is the release preset with the CUDA backend required; arguments after the word go to CMake.
set -euo pipefail
usage() { echo "usage: tests/bench/gpu.sh test [CMAKE-ARGUMENT...]" >&2; exit 2; }
[ $# -ge 1 ] || usage
what=$1; shift
cd "$(dirname "$0")/../.."
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU: nvidia-smi fails" >&2; exit 1; }

build() {
  mkdir -p build
  cmake --preset release -DMOESAIC_CUDA=ON "$@" >build/gpu.log 2>&1 || { tail -n 30 build/gpu.log; exit 1; }
  cmake --build --preset release -j "$(nproc)" >>build/gpu.log 2>&1 || { grep -E 'error|FAILED' -A6 build/gpu.log | head -n 60; exit 1; }
}

case $what in
  test) build "$@"; exec tests/bench/gpu_test.sh build/release ;;
  *) usage ;;
esac
