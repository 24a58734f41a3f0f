#!/usr/bin/env bash
# An S3 store for one machine: Ceph's object gateway over one disk file. For tests and a cluster without containers,
# on loopback only; one copy of each object, so a lost disk loses them.
#
#   s3.sh start FOLDER PORT    returns when it answers; keeps what FOLDER holds; does nothing if it runs
#   s3.sh stop FOLDER          asks its daemons to end and waits
#   s3.sh kill FOLDER          SIGKILL to all of them; stored objects survive it
#
# The keys of its one user come from S3_ACCESS_KEY and S3_SECRET_KEY; region us-east-1; no bucket is made.
# Needs the Debian packages ceph-mon ceph-osd radosgw ceph-common. Runs as any user, writes only into FOLDER.
set -euo pipefail
umask 077
# shellcheck source-path=SCRIPTDIR source=processes.sh
source "$(dirname "$0")/processes.sh"

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Process ids of one kind of daemon (or all) of this folder. No pid files: after a crash they could name strangers.
daemons() {
  local process words
  for process in /proc/[0-9]*; do
    { mapfile -d '' -t words <"$process/cmdline"; } 2>/dev/null || continue
    case "${words[0]:-}" in
      ${1:-ceph-mon} | ${1:-ceph-osd} | ${1:-radosgw}) ;;
      *) continue ;;
    esac
    if [[ "|${words[*]:1}" == "|-c $folder/ceph.conf "* ]]; then echo "${process#/proc/}"; fi
  done
}

end() { # end SIGNAL: to the gateway, the disk and the monitor in this order; who ignores it for 20 s is killed
  local kind signal told pid
  for kind in radosgw ceph-osd ceph-mon; do
    told=()
    for signal in "$1" KILL; do
      for pid in $(daemons $kind); do
        told+=("$pid")
        kill "-$signal" "$pid" 2>/dev/null || true
      done
      for _ in $(seq 200); do
        [[ -n $(daemons $kind) ]] || ! ended "${told[@]}" || continue 3
        sleep 0.1
      done
    done
  done
}

taken() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# A port below those that outgoing connections are given, so that it is free again after a restart.
free_port() {
  local candidate
  while candidate=$((20000 + RANDOM % 12000)) && taken "$candidate"; do :; done
  echo "$candidate"
}

answers() { # an anonymous list of buckets is 200 and empty
  local status
  exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
  printf 'GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' >&3
  read -r -t 10 status <&3 || status=
  exec 3>&-
  [[ $status == "HTTP/1.1 200"* ]]
}

# Everything that a first start makes; `made` says that it came to its end.
make_folder() {
  local fsid address
  : "${S3_ACCESS_KEY:?is the access key of the user that is made}" "${S3_SECRET_KEY:?is the secret of that user}"
  rm -rf "$folder/data" "$folder/run" "$folder/log"
  rm -f "$folder/ceph.conf" "$folder/keyring"
  mkdir -p "$folder"/data/{mon,osd,rgw} "$folder/run" "$folder/log"
  fsid=$(</proc/sys/kernel/random/uuid)
  address="v2:127.0.0.1:$(free_port)"
  cat >"$folder/ceph.conf" <<CONF
[global]
fsid = $fsid
mon host = [$address]
mon initial members = a
ms bind msgr1 = false
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
keyring = $folder/keyring
run dir = $folder/run
admin socket =
pid file =
crash dir = $folder/log
log file = $folder/log/\$name.log
# One disk, one copy, few and small pools.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
# A test machine may be nearly full; a batch of changes need not wait a second for more.
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.05
[mon.a]
mon data = $folder/data/mon
[osd.0]
osd data = $folder/data/osd
osd objectstore = bluestore
# A sparse file.
bluestore block size = 17179869184
bluestore cache autotune = false
bluestore cache size = 67108864
[client.rgw.a]
rgw data = $folder/data/rgw
rgw thread pool size = 16
rgw override bucket index max shards = 1
rgw dynamic resharding = false
CONF
  ceph-authtool --create-keyring "$folder/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  ceph-authtool "$folder/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  ceph-authtool "$folder/keyring" --gen-key -n client.rgw.a --cap mon 'allow *' --cap osd 'allow *'
  ceph-authtool "$folder/keyring" --gen-key -n osd.0 --cap mon 'allow *' --cap osd 'allow *'
  # The first maps are made here, with the disk in them, so that no command has to be sent to the monitor.
  monmaptool --create --fsid "$fsid" --addv a "[$address]" "$folder/run/monmap" >/dev/null
  osdmaptool -c "$folder/ceph.conf" --clobber --createsimple 1 "$folder/run/osdmap" >/dev/null
  ceph-mon -c "$folder/ceph.conf" -i a --mkfs --monmap "$folder/run/monmap" --osdmap "$folder/run/osdmap" \
    --keyring "$folder/keyring"
  ceph-osd -c "$folder/ceph.conf" -i 0 --no-mon-config --mkfs >"$folder/log/mkfs.log" 2>&1
}

make_user() {
  # In the environment and not among the arguments, which everybody on the machine may read.
  CEPH_ARGS="--access-key=$S3_ACCESS_KEY --secret-key=$S3_SECRET_KEY" timeout 120 radosgw-admin \
    -c "$folder/ceph.conf" -n client.rgw.a user create --uid=cffa --display-name=cffa >"$folder/log/user.log" 2>&1 ||
    { tail -n 5 "$folder/log/user.log" >&2 && exit 1; }
  rm -f "$folder/log/user.log"
  touch "$folder/made"
}

launch() { # launch PROGRAM ARGUMENTS...: as a daemon
  "$1" -c "$folder/ceph.conf" "${@:2}" </dev/null >>"$folder/log/start.log" 2>&1 || {
    echo "$1 did not start:" >&2
    tail -n 5 "$folder/log/start.log" >&2
    exit 1
  }
}

start() {
  if [[ -z $(daemons radosgw) ]]; then
    if taken "$port"; then
      echo "port $port of 127.0.0.1 is taken; stop what listens there or choose another" >&2
      exit 1
    fi
    end KILL # what an interrupted start or a dead gateway left running
    [[ -f $folder/made ]] || make_folder
    launch ceph-mon -i a
    launch ceph-osd -i 0
    [[ -f $folder/made ]] || make_user
    launch radosgw -n client.rgw.a --rgw-frontends "beast endpoint=127.0.0.1:$port"
  fi
  for _ in $(seq 600); do
    if answers 2>/dev/null; then
      echo "S3 at http://127.0.0.1:$port"
      return
    fi
    [[ -n $(daemons radosgw) ]] || break
    sleep 0.2
  done
  echo "the gateway does not answer on port $port; its logs are in $folder/log" >&2
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
