#!/usr/bin/env bash
# Experts that do not all fit the GPU, on demand and ahead, at several budgets (residency.sh): few large experts, many small ones, and the
# paper's small two-matrix ones; then cold experts copied, computed by the host, or whichever ends sooner.
# Run by gpu.sh residency, in the repository root: $1 the build, $2 a folder for the figures.
set -uo pipefail
export BUILD=${1:-build/release} failed=0
figures=${2:-build/gpu}
# table NAME SHAPE: layers so that all experts fit, prompts so long that copies take from a quarter to four times the computation.
table() {
  OUT=$figures/$1 tests/bench/residency.sh "$2" --backend cuda || failed=1
  echo "($SECONDS s)"
}
LAYERS=12 SKEWS=1.2 PREFILL=8192,16384,24576,32768 OUTPUT=24 LIMIT=155 table experts qwen3-30b-a3b
# An expert of Mixtral takes 7 ms to copy, and 16 tokens want all of them: few tokens say enough.
RUNS=2 LAYERS=8 SKEWS=0.8 PREFILL=2048,8192,16384,30720 OUTPUT=6 LIMIT=180 table experts mixtral-8x7b
LAYERS=12 SKEWS=1.0 PREFILL=1920 KV=1GiB LIMIT=50 table experts switch-base-128
RUNS=2 LAYERS=12 SKEWS=1.2 COLD="fetch host auto" PREFILL=128 OUTPUT=16 LIMIT=150 table cold qwen3-30b-a3b
exit $failed
