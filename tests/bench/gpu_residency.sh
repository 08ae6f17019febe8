#!/usr/bin/env bash
# Experts that do not all fit the GPU, on demand and ahead, at several budgets (residency.sh): few large experts, then many small ones.
# Run by gpu.sh residency, in the repository root: $1 the build, $2 a folder for the figures.
set -uo pipefail
export BUILD=${1:-build/release} OUT=${2:-build/gpu} failed=0
# An expert of Mixtral takes 7 ms to copy, and 16 tokens want all of them: few tokens say enough.
LAYERS=4 SKEWS=0.8 OUTPUT=12 RUNS=2 LIMIT=270 tests/bench/residency.sh mixtral-8x7b --backend cuda || failed=1
LAYERS=4 SKEWS="0.6 1.2" OUTPUT=24 LIMIT=240 tests/bench/residency.sh qwen3-30b-a3b --backend cuda || failed=1
exit $failed
