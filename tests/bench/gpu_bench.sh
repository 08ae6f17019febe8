#!/usr/bin/env bash
# The machine's bounds and the expert FFN; then a model with the experts in process, in a worker of its own on the same GPU (without
# and with MPS), and on a second GPU where there is one. Run by gpu.sh bench, in the repository root: $1 the build, $2 a folder for
# the figures.
set -uo pipefail
build=${1:-build/release} out=${2:-build/gpu} failed=0
source tests/bench/gpu_model.sh
runs=${RUNS:-3}

timeout 60 "$build/bench/bench_cuda_ffn" >"$out/ffn.txt" 2>&1 || { echo "FAIL bench_cuda_ffn: $(tail -c 600 "$out/ffn.txt")"; failed=1; }
bounds=$(grep -m1 '^device copy' "$out/ffn.txt")
bandwidth=$(sed -E 's/^device copy ([0-9.]+) GB.*/\1/' <<<"$bounds") rate=$(sed -E 's/.* ([0-9.]+) TFLOP.*/\1/' <<<"$bounds")
if [ -z "$bandwidth" ] || [ -z "$rate" ]; then
  echo "no bounds from bench_cuda_ffn"
  exit 1
fi
echo "bounds: $bounds"
known=(--measured-bandwidth "$bandwidth" --measured-rate "$rate")

measure inproc 110 "${known[@]}" --experts inproc --runs "$runs"

# beside NAME OPTIONS...: experts in a worker process. `exact` sends a row for every expert of a token, 64 KiB a layer of this shape, so
# that its prompts and lists are short and its prefill goes in pieces.
beside() {
  local name=$1; shift
  output=16 prompt=16 concurrency=$(sed 's/,256$//' <<<"$concurrency") prefill=$(cut -d, -f1 <<<"$prefill") \
    measure "$name-exact" 60 "${known[@]}" --experts ipc --workers 1 --runs 1 --combine exact --max-num-batched-tokens 512 "$@"
  output=32 prompt=32 measure "$name-partial" 60 "${known[@]}" --experts ipc --workers 1 --runs 1 --combine partial "$@"
}
beside ipc
output=32 prompt=32 measure shm-partial 60 "${known[@]}" --experts shm --workers 1 --runs 1 --combine partial
if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
  beside gpu2 --devices 1 --router-device 0
  output=32 prompt=32 measure gpu2-shm-partial 60 "${known[@]}" --experts shm --workers 1 --runs 1 --combine partial --devices 1 --router-device 0
else
  echo "not measured: a worker on a second GPU (there is one GPU)"
fi

# A daemon of its own, in a folder of its own; it ends with this script.
mps=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
if command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d >"$out/mps.txt" 2>&1; then
  trap 'echo quit | nvidia-cuda-mps-control >>"$out/mps.txt" 2>&1; rm -rf "$mps"' EXIT
  beside mps
else
  trap 'rm -rf "$mps"' EXIT
  echo "not measured: a worker under MPS (it did not start: $(head -c 200 "$out/mps.txt" 2>/dev/null))"
fi

sed -n '/^shape /,$p' "$out/ffn.txt"
echo "$bounds"
python3 tests/bench/gpu_table.py "$out"
exit $failed
