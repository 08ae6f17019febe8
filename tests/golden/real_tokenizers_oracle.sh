#!/bin/bash
# Tokenizers of real models: ours against Hugging Face's and @lenml/tokenizers', on texts of many languages, code and odd
# characters; their chat templates against jinja2. The tokenizers are fetched from npm into build/.
# usage: tests/golden/real_tokenizers_oracle.sh [BUILD_DIR]   (default build/release; needs node, npm and its registry, python3-jinja2)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/release}
work=$root/build/real-tokenizers
names=(gptoss qwen3 llama3 deepseek_v3 llama2) # the largest first
export ORACLE_MODULES=$work/node_modules
mkdir -p "$work"
cp "$root"/tests/golden/real_tokenizers/{package.json,package-lock.json,.npmrc} "$work"/
# What is installed is used again where the lock file is the same.
if ! cmp -s "$work/package-lock.json" "$work/installed-lock.json"; then
  (cd "$work" && npm ci --ignore-scripts --no-audit --no-fund --silent)
  cp "$work/package-lock.json" "$work/installed-lock.json"
fi
ninja -C "$build" tokenize_lines render_chat >/dev/null

status=0
# The models run two at a time; together they take about half a minute of processor time.
printf '%s\n' "${names[@]}" | timeout 300 xargs -P 2 -I NAME sh -c \
  'node "$0/tests/golden/real_tokenizers/compare.mjs" "$0" "$1" NAME >"$2/NAME.log" 2>&1' \
  "$root" "$build/tests/tokenize_lines" "$work" || status=1
# Those without a template of their own take one of tests/data.
/usr/bin/python3 "$root/tests/golden/real_tokenizers/compare_templates.py" "$root" "$build/tests/render_chat" "$ORACLE_MODULES" \
  llama2=llama2.jinja llama3 qwen3 deepseek_v3 gptoss=gpt_oss.jinja >"$work/templates.log" 2>&1 || status=1

passed=0 failed=0
for log in "${names[@]}" templates; do
  cat "$work/$log.log"
  counts=$(sed -nE 's/.*: ([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$work/$log.log")
  [ -n "$counts" ] || { echo "$log: no result"; counts="0 1"; }
  while read -r p f; do passed=$((passed + p)) failed=$((failed + f)); done <<<"$counts"
done
echo "real tokenizers and templates: $passed passed, $failed failed"
[ "$status" -eq 0 ] && [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
