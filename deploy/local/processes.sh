# shellcheck shell=bash
# What the scripts of this folder share; they read it in.

# ended PID...: true once no thread of these processes runs. A process that is being killed loses its name and folder
# first and its sockets last, so that until then its port may still answer.
ended() {
  local pid stat line
  for pid; do
    for stat in "/proc/$pid"/task/*/stat; do
      { read -r line <"$stat"; } 2>/dev/null || continue
      [[ ${line##*) } == [ZX]* ]] || return 1
    done
  done
}
