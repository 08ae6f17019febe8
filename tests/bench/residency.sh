#!/usr/bin/env bash
# What a part of the experts on the device costs, and what pre-gating hides of it, one process a shape:
#   tests/bench/residency.sh [search] SHAPE [OPTION...]
# SHAPE: demo (trained weights, its own pre-gates, its own routing), or a folder of models/shapes (generated weights, the next layer's
# gate as pre-gate, routing by --dummy-routing). OPTIONs go to `moesaic bench`, such as --backend cuda. search: one short run of each
# setting, and T_copy / T_compute alone, to choose settings from. From the environment: BUILD (build/release), OUT (a folder for logs and
# CSV, build/residency), LAYERS, FRACTIONS in percent, SKEWS of Zipf, LOCALITY, GATINGS, COLD (of fetch, host, auto), CONCURRENCY, PREFILL,
# OUTPUT, RUNS, KV (memory of the cache), LIMIT in s.
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/../.."
mode=table
if [ "${1:-}" = search ]; then mode=search; shift; fi
[ $# -ge 1 ] || usage
shape=$1; shift
build=${BUILD:-build/release} out=${OUT:-build/residency}
layers=${LAYERS:-4} fractions=${FRACTIONS:-10 25 50 75} gatings=${GATINGS:-gate pre-gate} colds=${COLD:-fetch} locality=${LOCALITY:-0.3}
concurrency=${CONCURRENCY:-1,4,16} prefill=${PREFILL:-128} output=${OUTPUT:-48} runs=${RUNS:-3} limit=${LIMIT:-240}
if [ "$mode" = search ]; then runs=1 output=12; fi
if [ "$shape" = demo ]; then
  model=(models/demo) routings=("")
else
  [ -f "models/shapes/$shape/config.json" ] || { echo "there is no models/shapes/$shape" >&2; exit 2; }
  model=("models/shapes/$shape" --load-format dummy --skip-tokenizer-init --layers "$layers" --pre-gates next-gate)
  routings=()
  for skew in ${SKEWS:-0.6 1.2}; do routings+=("dummy-routing=zipf:$skew,locality:$locality"); done
fi

# All experts on the device first: what the others are held against.
sweep=""
for routing in "${routings[@]}"; do
  for gating in $gatings; do sweep+="gating=$gating device-memory=100% $routing;"; done
  for fraction in $fractions; do
    for gating in $gatings; do
      for cold in $colds; do sweep+="gating=$gating device-memory=$fraction% cold-experts=$cold $routing;"; done
    done
  done
done
longest=$(tr , '\n' <<<"$prefill" | sort -n | tail -1)
mkdir -p "$out"
name=$out/$shape-$mode
rm -f "$name.csv"
timeout "$limit" "$build/bin/moesaic" bench "${model[@]}" --experts inproc --max-model-len $((longest > 512 ? longest + 128 : 512)) \
  --max-num-batched-tokens $((longest > 512 ? longest : 512)) --kv-cache-memory "${KV:-2GiB}" --concurrency "$concurrency" \
  --prompt-tokens 16 --output-tokens "$output" --prefill-tokens "$prefill" --runs "$runs" --sweep "${sweep%;}" --csv "$name.csv" "$@" >"$name.txt" 2>&1 || {
  echo "FAIL residency $shape (exit $?): $(tail -c 600 "$name.txt")"
  failed=1 # what was measured until then is shown all the same
}
[ -s "$name.csv" ] || exit 1
echo "$shape: $(nproc) cores$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | sed 's/^/, /')"
if [ "$mode" = search ]; then set -- --ratios; else set --; fi
python3 tests/bench/residency_table.py "$@" "$name.csv" | tee "$name.table.txt"
exit "${failed:-0}"
