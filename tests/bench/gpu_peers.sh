#!/usr/bin/env bash
# The model in Moesaic, then in transformers, and the ratios. Run by gpu.sh peers, in the repository root: $1 the build, $2 a folder for
# the figures.
set -uo pipefail
build=${1:-build/release} out=${2:-build/gpu} failed=0
source tests/bench/gpu_model.sh
measure peers-moesaic 120 --experts inproc --runs "${RUNS:-3}"
beside=()
[ -f "$out/peers-moesaic.csv" ] && beside=(--moesaic "$out/peers-moesaic.csv")
HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 timeout 380 python3 tests/bench/peer_transformers.py "$shape" --layers "${LAYERS:-0}" --batches "$concurrency" \
  --prompt $prompt --new $output --prefill "$prefill" --budget 300 --csv "$out/peers-transformers.csv" "${beside[@]}" \
  2>"$out/peers-transformers.err" | tee "$out/peers-transformers.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || { echo "FAIL peer_transformers.py: $(tail -c 600 "$out/peers-transformers.err")"; failed=1; }
exit $failed
