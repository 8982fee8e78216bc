#!/usr/bin/env bash
# A Slurm cluster on this machine alone, of two nodes that are not there, for this user's tests.
#
#   slurm_cluster.sh start DIR    configuration, state and logs go to DIR; prints SLURM_CONF=...
#   slurm_cluster.sh stop DIR
#
# Needs munged, slurmctld and slurmd (Debian: slurm-wlm munge). No root, systemd or cgroups.
set -euo pipefail

dir=$(realpath "$2")
nodes=(127.0.0.1 127.0.0.2) # Names that resolve everywhere: JAX connects to the first.

port() {
    python3 -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'
}

start() {
    mkdir -p "$dir/state"
    chmod 755 "$dir"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    local host user
    host=$(hostname -s)
    user=$(id -un)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n.spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
CONF
    local node
    for node in "${nodes[@]}"; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port) CPUs=2"
    done >>"$dir/slurm.conf"
    echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"

    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    for node in "${nodes[@]}"; do slurmd -N "$node"; done
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "${#nodes[@]}" ]; then
            echo "SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    sinfo --long >&2
    tail -n 20 "$dir"/*.log >&2
    return 1
}

stop() {
    export SLURM_CONF=$dir/slurm.conf
    scancel --user="$(id -un)" || true
    sleep 1
    local file
    for file in "$dir"/*.pid; do
        if [ -f "$file" ]; then kill "$(cat "$file")" || true; fi
    done
}

case "${1:-}" in
start) start ;;
stop) stop ;;
*)
    echo "usage: slurm_cluster.sh start|stop DIR" >&2
    exit 2
    ;;
esac
