#!/usr/bin/env bash
# Moesaic on this machine, from a fresh clone: installs what is missing, builds, serves the demo model from expert workers, sends one
# sample chat request and keeps serving until Ctrl-C.
#
#   deploy/local.sh [--once] [--detach] [--stop] [--port P] [--workers N] [--model DIR] [-- MORE SERVE OPTIONS]
#
#   --once     stop after the sample request
#   --detach   return once the sample was answered, and leave the cluster running
#   --stop     stop the cluster that --detach left running
set -euo pipefail
cd "$(dirname "$0")/.."
mode=foreground port=8000 workers=2 model=models/demo more=()
need() { [ $# -ge 2 ] && [ -n "$2" ] || { echo "local.sh: $1 needs a value" >&2; exit 2; }; }
while [ $# -gt 0 ]; do
  case $1 in
    --once) mode=once ;;
    --detach) mode=detach ;;
    --stop) mode=stop ;;
    --port) need "$@"; port=$2; shift ;;
    --workers) need "$@"; workers=$2; shift ;;
    --model) need "$@"; model=$2; shift ;;
    --) shift; more=("$@"); break ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "local.sh: unknown option '$1'; see --help" >&2; exit 2 ;;
  esac
  shift
done

state=build/local
pid_file=$state/serve.pid
# The pid is ours only while it is a moesaic process: numbers are used again.
running() { [ -f "$pid_file" ] && tr '\0' ' ' <"/proc/$(cat "$pid_file")/cmdline" 2>/dev/null | grep -q 'moesaic serve'; }
stop_cluster() {
  running || return 0
  local pid; pid=$(cat "$pid_file")
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 300); do kill -0 "$pid" 2>/dev/null || { rm -f "$pid_file"; return 0; }; sleep 0.1; done
  echo "local.sh: the cluster (pid $pid) did not stop within 30 s" >&2
  return 1
}

if [ "$mode" = stop ]; then
  running || { echo "local.sh: nothing is running"; exit 0; }
  stop_cluster && echo "stopped"
  exit 0
fi
running && { echo "local.sh: a cluster is running already (pid $(cat "$pid_file")); deploy/local.sh --stop ends it" >&2; exit 1; }

say() { printf '\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '%s\n' "$*"; }
mkdir -p "$state"
log=$state/serve.log
say "1/4 packages";  deploy/install-deps.sh
say "2/4 build"
cmake --preset release >"$state/build.log" 2>&1 && cmake --build --preset release >>"$state/build.log" 2>&1 ||
  { tail -30 "$state/build.log" >&2; echo "local.sh: the build failed; all of its output: $state/build.log" >&2; exit 1; }

say "3/4 serving $model with $workers expert workers on http://127.0.0.1:$port"
build/release/bin/moesaic serve "$model" --workers "$workers" --port "$port" "${more[@]}" >"$log" 2>&1 &
echo $! >"$pid_file"
[ "$mode" = detach ] || trap 'stop_cluster' EXIT
trap 'exit 130' INT TERM
for i in $(seq 600); do
  running || { tail -20 "$log" >&2; echo "local.sh: the cluster ended; its log: $log" >&2; exit 1; }
  curl -fsS -o /dev/null "http://127.0.0.1:$port/readiness" 2>/dev/null && break
  [ "$i" -lt 600 ] || { tail -20 "$log" >&2; echo "local.sh: not ready within 60 s; its log: $log" >&2; exit 1; }
  [ -t 1 ] && [ $((i % 10)) -eq 0 ] && printf '\r    waiting for readiness, %d s' $((i / 10))
  sleep 0.1
done
[ -t 1 ] && printf '\r\033[K'
build/release/bin/moesaic status --url "http://127.0.0.1:$port"

question='What is nginx?'
say "4/4 a sample chat request: $question"
printf '%s\n/exit\n' "$question" | build/release/bin/moesaic chat --url "http://127.0.0.1:$port" --temperature 0
case $mode in
  once) exit 0 ;;
  detach) say "left running (pid $(cat "$pid_file"), log $log); deploy/local.sh --stop ends it"; exit 0 ;;
esac
say "serving on http://127.0.0.1:$port until Ctrl-C; log: $log. Try:"
echo "  build/release/bin/moesaic chat --url http://127.0.0.1:$port"
wait "$(cat "$pid_file")"
