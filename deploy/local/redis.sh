#!/usr/bin/env bash
# Redis for one machine: the broker of a cluster without containers, and of the tests. Loopback only, no password.
#
#   redis.sh start FOLDER PORT    returns when it answers; keeps what FOLDER holds; does nothing if it runs
#   redis.sh stop FOLDER          asks it to end and waits
#   redis.sh kill FOLDER          SIGKILL
#
# Needs the Debian package redis-server. Runs as any user; nothing is written outside FOLDER.
set -euo pipefail
umask 077
# shellcheck source-path=SCRIPTDIR source=processes.sh
source "$(dirname "$0")/processes.sh"

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Process ids of the server that works in this folder. No pid file: after a crash it could name a stranger.
server() {
  local process name
  for process in /proc/[0-9]*; do
    { read -r name <"$process/comm"; } 2>/dev/null || continue
    if [[ $name == redis-server && $process/cwd -ef $folder ]]; then echo "${process#/proc/}"; fi
  done
}

end() { # end SIGNAL: sends it and waits until the server is gone; one that ignores it for 20 s is killed
  local pid signal
  for pid in $(server); do
    for signal in "$1" KILL; do
      [[ $(server) != *"$pid"* ]] || kill "-$signal" "$pid" 2>/dev/null || true
      for _ in $(seq 200); do
        [[ $(server) == *"$pid"* ]] || ! ended "$pid" || continue 3
        sleep 0.1
      done
    done
  done
}

# The process id that answers on the port, once its data are loaded; empty if nothing does.
answering() {
  redis-cli -h 127.0.0.1 -p "$port" info 2>/dev/null | tr -d '\r' |
    awk -F: '$1 == "process_id" { pid = $2 } $1 == "loading" { loading = $2 } END { if (loading == "0") print pid }'
}

start() {
  local pid
  pid=$(server)
  if [[ -z $pid ]]; then
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "port $port of 127.0.0.1 is taken; stop what listens there or choose another" >&2
      exit 1
    fi
    # everysec: a power cut loses at most one second of messages, which the record has anyway.
    redis-server --daemonize yes --dir "$folder" --logfile "$folder/redis.log" --pidfile "$folder/redis.pid" \
      --bind 127.0.0.1 --port "$port" --save '' --appendonly yes --appendfsync everysec \
      --maxmemory-policy noeviction >/dev/null
  fi
  for _ in $(seq 600); do
    pid=$(server)
    [[ -n $pid ]] || break
    if [[ $(answering) == "$pid" ]]; then
      echo "Redis at redis://127.0.0.1:$port/0"
      return
    fi
    sleep 0.1
  done
  echo "Redis does not answer on port $port; $folder/redis.log ends with:" >&2
  tail -n 5 "$folder/redis.log" >&2 || true
  exit 1
}

[[ $# -ge 2 ]] || usage
action=$1 folder=$2 port=${3:-}
if [[ $action == start ]]; then
  [[ $port =~ ^[0-9]+$ ]] || usage
  mkdir -p "$folder"
fi
[[ -d $folder ]] || exit 0
folder=$(cd "$folder" && pwd -P)
case $action in
  start) start ;;
  stop) end TERM ;;
  kill) end KILL ;;
  *) usage ;;
esac
