#!/usr/bin/env bash
# Replaces the containers of a compose cluster one at a time, as after a change of image or settings, while requests run.
#   deploy/rolling.sh [--timeout SECONDS] [--compose "COMMAND"] [SERVICE...]
# Services: by default redis, expert-worker, router, in this order; front, which breaks its open connections, only where named.
# COMMAND is how compose is called, with its -p and -f (default: docker compose -f deploy/compose.yaml). Before a container is
# stopped and after its successor started, every expert must have all its READY replicas (`moesaic health cluster`), for SECONDS at
# most each (default 120); then the change stops there, with the cluster serving.
set -euo pipefail
timeout=120 compose="docker compose -f $(dirname "$0")/compose.yaml" services=() said=
while [ $# -gt 0 ]; do
  case $1 in
    --timeout) timeout=${2:?--timeout needs seconds}; shift ;;
    --compose) compose=${2:?--compose needs a command}; shift ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "rolling.sh: unknown option '$1'" >&2; exit 2 ;;
    *) services+=("$1") ;;
  esac
  shift
done
[ ${#services[@]} -gt 0 ] || services=(redis expert-worker router)
read -ra compose <<<"$compose"
containers() { "${compose[@]}" ps -q "$1"; }

# Asks a router, any that answers.
settled() {
  local router
  for router in $(containers router); do
    said=$(docker exec "$router" moesaic health cluster --client-key-file /run/secrets/api-key 2>&1) && return 0
  done
  return 1
}
wait_for() { # WHAT COMMAND...
  local what=$1 until=$((SECONDS + timeout)); shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$until" ] || { echo "rolling.sh: no $what within $timeout s; stopped here. $said" >&2; exit 1; }
    sleep 0.5
  done
}
# Routers and workers are asked directly, which is quicker than Docker's next check.
healthy() { # SERVICE CONTAINER
  case $1 in
    router) docker exec "$2" moesaic health router; return ;;
    expert-worker) docker exec "$2" moesaic health worker; return ;;
  esac
  case $(docker inspect -f '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' "$2") in
    healthy|running) return 0 ;;
  esac
  return 1
}
replace() { # SERVICE CONTAINER
  local service=$1 old=$2 count before new
  before=$(containers "$service" | sort)
  count=$(wc -w <<<"$before")
  wait_for "cluster with all its replicas" settled
  docker stop -t 900 "$old" >/dev/null
  docker rm "$old" >/dev/null
  said=$("${compose[@]}" up -d --no-deps --no-recreate --scale "$service=$count" "$service" 2>&1) ||
    { echo "rolling.sh: $service: no successor could be started: $said" >&2; exit 1; }
  new=$(comm -13 <(echo "$before") <(containers "$service" | sort))
  [ "$(wc -w <<<"$new")" -eq 1 ] || { echo "rolling.sh: $service: one new container was expected, there are: $new" >&2; exit 1; }
  wait_for "healthy $service" healthy "$service" "$new"
  wait_for "cluster with all its replicas" settled
  echo "rolling.sh: $service ${old:0:12} -> ${new:0:12} ($SECONDS s)"
}

for service in "${services[@]}"; do
  old=$(containers "$service")
  [ -n "$old" ] || { echo "rolling.sh: $service has no containers" >&2; exit 1; }
  for container in $old; do replace "$service" "$container"; done
done
