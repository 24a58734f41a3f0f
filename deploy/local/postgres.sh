#!/usr/bin/env bash
# PostgreSQL for one machine: the record of a cluster without containers, and of the tests. Loopback only.
#
#   postgres.sh start FOLDER PORT    returns when it answers; keeps what FOLDER holds; does nothing if it runs
#   postgres.sh stop FOLDER          asks it to end and waits
#   postgres.sh kill FOLDER          SIGKILL of the server and all its children; the next start recovers
#
# Role and database are `cffa`, the password (SCRAM) is POSTGRES_PASSWORD of the first start; the role may create
# databases. Needs the Debian package postgresql. Runs as any user, as root on behalf of the system user postgres,
# who then owns FOLDER; nothing is written outside it.
set -euo pipefail
umask 077
# shellcheck source-path=SCRIPTDIR source=processes.sh
[[ $(type -t ended) == function ]] || source "$(dirname "$0")/processes.sh"

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

refuse() {
  echo "$1" >&2
  exit 1
}

[[ $# -ge 2 ]] || usage
action=$1 folder=$2 port=${3:-}
case $action in
  start)
    [[ $port =~ ^[0-9]+$ ]] || usage
    mkdir -p "$folder"
    ;;
  stop | kill) [[ -d $folder ]] || exit 0 ;;
  *) usage ;;
esac
folder=$(cd "$folder" && pwd -P)
data=$folder/data

if [[ $(id -u) == 0 ]]; then # PostgreSQL refuses to run as root
  id postgres >/dev/null 2>&1 || refuse "there is no system user postgres; install the package postgresql"
  [[ $action != start ]] || chown postgres: "$folder"
  # The text of this file instead of its path: the checkout may be closed to that user.
  text=$(cat "$(dirname "$0")/processes.sh" "$0")
  cd /
  exec setpriv --reuid=postgres --regid=postgres --init-groups --inh-caps=-all \
    bash -c "$text" "$0" "$action" "$folder" "$port"
fi

programs=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
[[ -x $programs/postgres ]] || refuse "no PostgreSQL under /usr/lib/postgresql; install the package postgresql"
[[ $action != start || -w $folder && -x $folder ]] ||
  refuse "$folder is closed to the user $(id -un), under whom PostgreSQL runs; choose a folder that is not"

# Process ids of the server and its children, which all work in the data folder.
processes() {
  local process name
  for process in /proc/[0-9]*; do
    { read -r name <"$process/comm"; } 2>/dev/null || continue
    if [[ $name == postgres && $process/cwd -ef $data ]]; then echo "${process#/proc/}"; fi
  done
}

# The process id of the server itself; empty if only children of a dead one, or nothing, is left.
server() {
  local pid=
  { read -r pid <"$data/postmaster.pid"; } 2>/dev/null || true
  if [[ -n $pid ]] && processes | grep -qx -- "$pid"; then echo "$pid"; fi
}

kill_all() {
  local pid told=()
  pid=$(server)
  if [[ -n $pid ]]; then # first, so that it starts no more
    told=("$pid")
    kill -KILL "$pid" 2>/dev/null || true
  fi
  for _ in $(seq 200); do
    pid=$(processes)
    if [[ -z $pid ]] && ended "${told[@]}"; then return 0; fi
    # shellcheck disable=SC2206 # one word for each process
    told+=($pid)
    # shellcheck disable=SC2086
    [[ -z $pid ]] || kill -KILL $pid 2>/dev/null || true
    sleep 0.05
  done
  refuse "some processes of PostgreSQL in $folder do not end"
}

create() { # a folder half made by an interrupted first start is made anew
  [[ -n ${POSTGRES_PASSWORD:-} ]] || refuse "POSTGRES_PASSWORD is not set"
  rm -rf "$data.new"
  "$programs/initdb" --pgdata="$data.new" --username=postgres --auth=peer --encoding=UTF8 --locale=C.UTF-8 \
    >"$folder/initdb.log" 2>&1 || refuse "initdb failed: $(tail -n 3 "$folder/initdb.log")"
  # The superuser has no password, so that nobody becomes it but through single-user mode.
  printf '%s\n' 'host all all 127.0.0.1/32 scram-sha-256' 'local all all scram-sha-256' >"$data.new/pg_hba.conf"
  "$programs/postgres" --single -D "$data.new" postgres >>"$folder/initdb.log" 2>&1 <<SQL
CREATE ROLE cffa LOGIN CREATEDB PASSWORD '${POSTGRES_PASSWORD//\'/\'\'}'
CREATE DATABASE cffa OWNER cffa
SQL
  mv "$data.new" "$data"
}

# Log in as the service will; says nothing if it works, else why not.
answers() {
  PGPASSWORD=${POSTGRES_PASSWORD:-} PGCONNECT_TIMEOUT=10 "$programs/psql" --no-psqlrc --no-password --quiet \
    --output=/dev/null --command='SELECT 1' "host=127.0.0.1 port=$port user=cffa dbname=cffa" 2>&1
}

start() {
  local why
  [[ -d $data ]] || create
  if [[ -z $(server) ]]; then
    kill_all # children that outlived their server hold its memory
    if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      refuse "port $port of 127.0.0.1 is taken; stop what listens there or choose another"
    fi
    # Of a killed server, if there; their numbers may be another process's by now.
    rm -f "$data/postmaster.pid" "$folder"/.s.PGSQL.*
    # The socket's folder is relative to the data folder: a path of a socket has at most 107 bytes.
    "$programs/pg_ctl" start --wait --timeout=150 --silent --pgdata="$data" --log="$folder/postgres.log" --options="-p \
      $port -c listen_addresses=127.0.0.1 -c unix_socket_directories=.. -c max_connections=200 -c log_checkpoints=off" ||
      refuse "PostgreSQL does not start; $folder/postgres.log ends with: $(tail -n 5 "$folder/postgres.log")"
  fi
  for _ in $(seq 600); do
    if why=$(answers); then
      echo "PostgreSQL at postgresql://cffa@127.0.0.1:$port/cffa"
      return
    fi
    [[ $why != *"authentication failed"* ]] || break
    [[ -n $(server) ]] || break
    sleep 0.1
  done
  echo "$why" >&2
  refuse "PostgreSQL does not answer on port $port; $folder/postgres.log ends with: $(tail -n 5 "$folder/postgres.log")"
}

stop() {
  [[ -n $(server) ]] &&
    "$programs/pg_ctl" stop --silent --mode=fast --wait --timeout=60 --pgdata="$data" 2>/dev/null || kill_all
}

case $action in
  start) start ;;
  stop) stop ;;
  kill) kill_all ;;
esac
