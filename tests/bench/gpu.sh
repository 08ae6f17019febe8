#!/usr/bin/env bash
# What a GPU host shows, in the repository root, each part in less than 9 minutes on 16 cores:
#   tests/bench/gpu.sh test|bench|peers|residency [-o FOLDER] [CMAKE-ARGUMENT...]
#   test   the GPU tests, and the sanitizers
#   bench  the expert FFN and a whole model beside the machine's bounds: experts in process, in a worker process, on a second GPU
#   peers  that model beside PyTorch and transformers
#   residency  experts that do not all fit, copied on demand and ahead, at several budgets
# All but test leave logs and CSV in FOLDER (build/gpu) and end with tables. The build is the release preset with the CUDA
# backend required; further arguments go to CMake.
set -euo pipefail
usage() { sed -n '3,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || usage
what=$1 out=build/gpu; shift
if [ "${1:-}" = -o ]; then
  [ $# -ge 2 ] || usage
  out=$2; shift 2
fi
[[ $what =~ ^(test|bench|peers|residency)$ ]] || usage
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU: nvidia-smi fails" >&2; exit 1; }

mkdir -p build
cmake --preset release -DMOESAIC_CUDA=ON "$@" >build/gpu.log 2>&1 || { tail -n 30 build/gpu.log; exit 1; }
cmake --build --preset release -j "$(nproc)" >>build/gpu.log 2>&1 || { grep -E 'error|FAILED' -A6 build/gpu.log | head -n 60; exit 1; }
if [ "$what" = test ]; then exec tests/bench/gpu_test.sh build/release; fi
mkdir -p "$out"
exec "tests/bench/gpu_$what.sh" build/release "$out"
