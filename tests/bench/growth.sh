#!/usr/bin/env bash
# Growth: tokens/s and time per layer as concurrency, context and experts grow, experts in process and in two ipc workers.
# Usage: growth.sh [CONCURRENCY [CONTEXT [EXPERTS]]], lists with commas, each after the defaults below; an empty list skips that
# part. MOESAIC and MAKE_CHECKPOINT name the programs (default: those of build/release), RUNS the rounds of each measurement.
# Prints one Markdown table a part: a row per measurement, medians over the rounds; times are µs of one layer of one micro-batch.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
moesaic=${MOESAIC:-$root/build/release/bin/moesaic} make_checkpoint=${MAKE_CHECKPOINT:-$root/build/release/tests/make_checkpoint}
runs=${RUNS:-3}
concurrency=${1-1,2,4,8,16,32,64} contexts=${2-128,256,512,1024,2048} experts=${3-16,32,64,128,256}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

header() { printf '\n| %s | experts in | tokens/s | ms/token | attention | plan | wait | expert |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n' "$1"; }

# rows LABEL CSV: one row for each place of the experts and number of requests; LABEL "" stands for the requests.
rows() {
    awk -F, -v label="$1" '
        function median(list, n,    sorted, i, j, v) {
            n = split(list, sorted, " ")
            for (i = 2; i <= n; i++) { v = sorted[i] + 0; for (j = i - 1; j > 0 && sorted[j] + 0 > v; j--) sorted[j + 1] = sorted[j]; sorted[j + 1] = v }
            return n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
        }
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        $at["phase"] == "decode" {
            key = $at["requests"] SUBSEP $at["experts"]
            if (!(key in seen)) { seen[key] = 1; order[++count] = key }
            split("tokens_per_second ms_per_token attention_us plan_us wait_us expert_us", names, " ")
            for (i = 1; i <= 6; i++) values[key, i] = values[key, i] " " $at[names[i]]
        }
        END {
            for (k = 1; k <= count; k++) {
                split(order[k], part, SUBSEP)
                printf "| %s | %s | %.0f | %.3f | %.0f | %.0f | %.0f | %.0f |\n", label == "" ? part[1] : label, part[2],
                    median(values[order[k], 1]), median(values[order[k], 2]), median(values[order[k], 3]), median(values[order[k], 4]),
                    median(values[order[k], 5]), median(values[order[k], 6])
            }
        }' "$2"
}

bench() { "$moesaic" bench "$@" --experts inproc,ipc --runs "$runs" --prefill-tokens 16 --csv "$folder/bench.csv" > /dev/null; }

if [ -n "$concurrency" ]; then
    header 'requests at once'
    bench "$root/models/demo" --concurrency "$concurrency" --output-tokens 64
    rows '' "$folder/bench.csv"
fi
if [ -n "$contexts" ]; then
    header 'context, tokens'
    for context in ${contexts//,/ }; do # 32 tokens are decoded up to that context
        bench "$root/models/demo" --concurrency 8 --prompt-tokens $((context - 33)) --output-tokens 32
        rows "$context" "$folder/bench.csv"
    done
fi
if [ -n "$experts" ]; then
    header 'experts of a layer'
    for count in ${experts//,/ }; do
        "$make_checkpoint" "$folder/model" --layers 4 --experts "$count" --top-k 8 --hidden 256 --intermediate 192 --heads 4 --kv-heads 2 \
            --head-dim 64 --vocab 8192 --positions 2048 > /dev/null
        bench "$folder/model" --skip-tokenizer-init --concurrency 8 --output-tokens 64
        rows "$count" "$folder/bench.csv"
        rm -r "$folder/model"
    done
fi
