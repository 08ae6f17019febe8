# Sourced by gpu_bench.sh and gpu_peers.sh: the model that both measure, and how. SHAPE, LAYERS, CONCURRENCY, PREFILL, RUNS can be set for a
# smaller card. Needs $build and $out.
shape=${SHAPE:-models/shapes/qwen3-30b-a3b} concurrency=${CONCURRENCY:-1,64,256} prefill=${PREFILL:-2048,8192}
most_seqs=$(tr , '\n' <<<"$concurrency" | sort -n | tail -1) most_tokens=$(tr , '\n' <<<"$prefill" | sort -n | tail -1)
prompt=128 output=128

# measure NAME LIMIT_S OPTIONS...: one `moesaic bench` into NAME.csv and NAME.txt; says so when it fails or takes too long.
measure() {
  local name=$1 limit=$2 began=$SECONDS; shift 2
  timeout -k 10 "$limit" "$build/bin/moesaic" bench "$shape" --load-format dummy --layers "${LAYERS:-0}" --backend cuda --concurrency "$concurrency" \
    --prompt-tokens $prompt --output-tokens $output --prefill-tokens "$prefill" --max-num-seqs "$most_seqs" \
    --max-num-batched-tokens "$most_tokens" --max-model-len $((most_tokens + prompt + output)) --kv-cache-memory "${KV:-8GiB}" \
    --csv "$out/$name.csv" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  if [ $status -eq 0 ]; then echo "ok   $name ($((SECONDS - began)) s)"; return 0; fi
  echo "FAIL $name (exit status $status, $((SECONDS - began)) s): $(tail -c 600 "$out/$name.txt")"
  [ -s "$out/$name.csv" ] && [ "$(wc -l <"$out/$name.csv")" -gt 1 ] || rm -f "$out/$name.csv" # what was measured stays
  failed=1
  return 1
}
