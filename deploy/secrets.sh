#!/usr/bin/env bash
# Makes the secrets of docker-compose.yml, once: secrets.sh [FOLDER], by default deploy/secrets. Files that are there stay.
#
# The folder is 0700: on this machine nobody else gets to the files. The files themselves are 0444, because compose
# binds them into the containers as they are, and each server there runs as a user of its own.
set -euo pipefail
umask 077
folder=${1:-"$(cd "$(dirname "$0")" && pwd)/secrets"}
mkdir -p "$folder"
chmod 0700 "$folder"

# random BYTES: that many random bytes in hexadecimal
random() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

make_secret() { # make_secret NAME VALUE: written whole or not at all, never over another
  [[ -e $folder/$1 ]] && return
  printf '%s' "$2" >"$folder/.$1.new"
  chmod 0444 "$folder/.$1.new"
  mv -n "$folder/.$1.new" "$folder/$1"
  echo "made $folder/$1"
}

make_secret cffa_database_password "$(random 24)"
make_secret cffa_broker_password "$(random 24)"
make_secret cffa_s3_access_key "cffa$(random 8)"
make_secret cffa_s3_secret_key "$(random 20)"
make_secret cffa_bootstrap_key "$(random 32)"
make_secret cffa_key_secret "$(random 32)"
make_secret cffa_grafana_password "$(random 16)"
