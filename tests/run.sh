#!/usr/bin/env bash
# The test command: installs what is missing, builds, runs every test. The last line is "N passed, N failed".
#   tests/run.sh [--full] [--only WORD]
#   --full       the long forms of the tests that have one (figures for docs/performance.md)
#   --only WORD  only the stages whose name has WORD: lint, release, e2e, deploy, asan-ubsan, tsan
set -uo pipefail
cd "$(dirname "$0")/.."
export MOESAIC_TEST_FULL=0
only=
while [ $# -gt 0 ]; do
  case $1 in
    --full) MOESAIC_TEST_FULL=1 ;;
    --only) only=${2:?--only needs a word}; shift ;;
    *) echo "run.sh: unknown option '$1'" >&2; exit 2 ;;
  esac
  shift
done

passed=0 failed=0
count() { passed=$((passed + $1)); failed=$((failed + $2)); }
wanted() { [ -z "$only" ] || [[ $1 == *"$only"* ]]; }
stage() { printf '\n=== %s (%(%H:%M:%S)T)\n' "$1" -1; }
finish() { printf '\n%d passed, %d failed\n' "$passed" "$failed"; [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]; exit; }

build() { # PRESET
  cmake --preset "$1" >"build/$1.log" 2>&1 && cmake --build --preset "$1" >>"build/$1.log" 2>&1 && return 0
  grep -E 'error|Error' -A5 "build/$1.log" | head -40
  echo "the build of $1 failed; all of its output: build/$1.log"
  count 0 1
  return 1
}

# ctest in a build folder; each test program counts as one.
run_ctest() { # PRESET LABELS
  local out="build/$1-ctest.log"
  ctest --test-dir "build/$1" -L "$2" --output-on-failure --no-tests=error -j2 >"$out" 2>&1
  local status=$? summary total bad
  summary=$(grep -aE 'tests passed, .* tests failed out of' "$out") # -a: a test's output may hold any byte
  total=$(sed -E 's/.* out of ([0-9]+).*/\1/' <<<"$summary")
  bad=$(sed -E 's/.*, ([0-9]+) tests failed.*/\1/' <<<"$summary")
  if [ -z "$summary" ]; then tail -40 "$out"; count 0 1; return; fi
  [ "$status" -eq 0 ] || grep -vE '^ *[0-9]+/[0-9]+ Test .* Passed|^ +Start' "$out" | tail -150
  echo "$1: $summary"
  count $((total - bad)) "$bad"
}

# A script or program that is one test: its output is shown when it fails. Status 77: it cannot run here, and says why.
run_one() { # NAME COMMAND...
  local name=$1 out="build/test-$1.log"; shift
  local began=$SECONDS
  "$@" >"$out" 2>&1
  local status=$?
  if [ $status -eq 0 ]; then echo "ok   $name ($((SECONDS - began)) s)"; grep -E '^figure:' "$out"; count 1 0
  elif [ $status -eq 77 ]; then echo "skip $name: $(tail -1 "$out")"
  else echo "FAIL $name ($((SECONDS - began)) s)"; tail -60 "$out"; count 0 1; fi
}

mkdir -p build
stage "packages"
deploy/install-deps.sh --tests || { count 0 1; finish; }

if wanted lint; then
  stage "lint"
  run_one lint /usr/bin/python3 tests/lint/lint.py
fi
if wanted release || wanted e2e; then
  stage "release: build"
  build release || finish
fi
if wanted release; then
  stage "release: unit, conformance, golden, sim, torture, fuzz corpora"
  run_ctest release '.*'
  for script in tests/golden/*_oracle.sh; do [ -e "$script" ] && run_one "golden-$(basename "$script" .sh)" "$script"; done
fi
if wanted e2e; then
  stage "e2e: real processes, real Redis"
  for test in tests/e2e/test_*.py; do [ -e "$test" ] && run_one "e2e-$(basename "$test" .py)" /usr/bin/python3 "$test"; done
fi
if wanted deploy; then
  stage "deploy: images and a compose cluster on a real Docker engine"
  run_one deploy tests/deploy/run.sh
fi
if wanted asan-ubsan; then
  stage "asan-ubsan"
  export LSAN_OPTIONS=suppressions=$PWD/tests/support/lsan.supp:print_suppressions=0
  build asan-ubsan && run_ctest asan-ubsan 'unit|conformance|sim|torture|fuzz'
fi
if wanted tsan; then
  stage "tsan"
  build tsan && MOESAIC_TEST_INPROC_ONLY=1 run_ctest tsan 'unit|conformance|sim'
fi
finish
