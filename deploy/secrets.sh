#!/usr/bin/env bash
# Makes what compose.yaml reads by file, once: the keys of routers, workers and operators, Redis's users and their passwords, and the
# API key. What is there already is kept.
#   deploy/secrets.sh [DIR] [--user UID:GID]     DIR: default deploy/secrets; UID:GID: of the containers, default 10001:10001
# As root the files are given to that user; otherwise they stay yours, and the containers have to run as you: put
# MOESAIC_USER=$(id -u):$(id -g) into .env. Keys are made by `moesaic keygen`: of the PATH, or of the image CLI_IMAGE (moesaic).
set -euo pipefail
dir=$(dirname "$0")/secrets user=10001:10001
while [ $# -gt 0 ]; do
  case $1 in
    --user) user=${2:?--user needs UID:GID}; shift ;;
    -*) echo "secrets.sh: unknown option '$1'" >&2; exit 2 ;;
    *) dir=$1 ;;
  esac
  shift
done
umask 077
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e "$dir/router.key" ]; then
  if command -v moesaic >/dev/null; then moesaic keygen "$dir" >/dev/null
  else docker run --rm --network none --user "$(id -u):$(id -g)" -v "$dir:/keys" "${CLI_IMAGE:-moesaic}" keygen /keys >/dev/null; fi
fi
[ -e "$dir/api-key" ] || random >"$dir/api-key"
# Only hashes of random passwords are in it. The health check may do nothing but PING.
grep -q '^user health ' "$dir/redis.acl" || echo 'user health on nopass resetkeys resetchannels -@all +ping' >>"$dir/redis.acl"
chmod 644 "$dir/redis.acl" "$dir"/*.pub
chmod 600 "$dir"/*.key "$dir"/redis-*.password "$dir/api-key"
chmod 711 "$dir"
if [ "$(id -u)" -eq 0 ]; then chown "$user" "$dir"/*; fi
echo "secrets.sh: $dir; the API key is in $dir/api-key"
