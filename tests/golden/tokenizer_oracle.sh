#!/bin/sh
# Compares our tokenizer with Hugging Face's and with @lenml/tokenizers on a large corpus.
# usage: tests/golden/tokenizer_oracle.sh [BUILD_DIR]   (default build/release; needs node, npm and its registry)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/release}
oracle=$root/build/tokenizer-oracle
mkdir -p "$oracle"
cp "$root"/tests/golden/tokenizer/package.json "$root"/tests/golden/tokenizer/package-lock.json \
   "$root"/tests/golden/tokenizer/.npmrc "$oracle"/
(cd "$oracle" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
ninja -C "$build" tokenize_lines >/dev/null
export ORACLE_MODULES="$oracle/node_modules"
node "$root/tests/golden/tokenizer/compare.mjs" "$root" "$build/tests/tokenize_lines"
