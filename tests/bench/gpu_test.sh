#!/usr/bin/env bash
# The GPU tests, and compute-sanitizer on the op table, a small run of segments and expert batches, the kernels' own tests and whole
# steps. Run by gpu.sh test, in the repository root, with everything built in $1 (build/release). Prints a summary; exit 1 if anything
# failed. Under 9 minutes.
set -uo pipefail
build=${1:-build/release}
failures=$(mktemp)
trap 'rm -f "$failures"' EXIT
note() { printf '%s\n' "$*"; }

# run NAME SECONDS CMD...: one line with its verdict; its end where it failed
run() {
  local name=$1 limit=$2 log start=$SECONDS; shift 2
  log=$(mktemp)
  timeout "$limit" "$@" >"$log" 2>&1
  local status=$?
  if [ $status -eq 77 ]; then note "skipped $name: $(tail -n 1 "$log")"
  elif [ $status -eq 0 ]; then
    note "ok      $name ($((SECONDS - start)) s; $(grep -cE '^\[       OK|^ok ' "$log") passed, $(grep -o '^\[  SKIPPED \] [0-9]*' "$log" | grep -o '[0-9]*$' || echo 0) skipped)"
    grep -h '^figure:' "$log"
  else
    note "FAILED  $name (exit $status, $((SECONDS - start)) s)"
    grep -vE '^\[ (RUN|      OK)' "$log" | tail -n 25
    echo "$name" >>"$failures"
  fi
  rm -f "$log"
}

tests=(test_backend_ops test_cuda_backend test_cuda_bfloat16 test_demo_logits test_fixture_logits test_layer_ffn test_local_steps)
for extra in "$build"/tests/test_cuda_*; do
  name=$(basename "$extra")
  [[ " ${tests[*]} " == *" $name "* ]] || tests+=("$name")
done
for name in "${tests[@]}"; do run "$name" 150 "$build/tests/$name"; done
for name in test_backend_ops test_cuda_backend test_fixture_logits; do
  run "$name, MOESAIC_CUDA_ARCH=sm80" 150 env MOESAIC_CUDA_ARCH=sm80 "$build/tests/$name"
done

# The cluster on the GPU: greedy tokens equal transformers' in every shape of cluster.
MOESAIC_BACKEND=cuda MOESAIC_DTYPE=float32 MOESAIC_BIN=$PWD/$build/bin run "e2e/test_golden.py, float32" 170 python3 tests/e2e/test_golden.py

# What layers are given and how they route, as it comes to the host.
MOESAIC_BIN=$PWD/$build/bin run e2e/test_gating_cuda.py 170 python3 tests/e2e/test_gating_cuda.py

# Two GPUs, where they are.
MOESAIC_BACKEND=cuda MOESAIC_DTYPE=float32 MOESAIC_BIN=$PWD/$build/bin run "e2e/test_devices.py, float32" 60 python3 tests/e2e/test_devices.py

# The sanitizers see the CUDA tests alone, without those that cannot run under them (each says why).
sanitize() { # TOOL NAME FILTER
  MOESAIC_TEST_SANITIZER=$1 MOESAIC_TEST_FILTER=$3 run "$1, $2" 200 \
    compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 99 "$build/tests/$2"
}
for tool in memcheck racecheck synccheck; do sanitize $tool test_cuda_backend 'cuda*'; done
for tool in memcheck racecheck synccheck; do # at a time: these look at nobody's free memory
  { sanitize $tool test_backend_ops 'cuda*'; sanitize $tool test_layer_ffn on_cuda; sanitize $tool test_cuda_attention test_bfloat16; } &
  { sanitize $tool test_cuda_ffn test_bfloat16; sanitize $tool test_cuda_local test_bfloat16; } &
done
wait
if [ -s "$failures" ]; then
  note "GPU tests: $(wc -l <"$failures") failed: $(paste -sd , "$failures")"
  exit 1
fi
note "GPU tests: all passed"
