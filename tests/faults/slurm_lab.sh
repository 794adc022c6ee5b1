#!/bin/bash
# slurm_lab.sh CMD...: on n1 of a netlab, make its hosts a Slurm cluster, run CMD, and end the daemons.
# Needs Debian's slurm-wlm and munge. Exits with CMD's code; 77 = cannot run here (skip).
set -euo pipefail
for t in munged slurmctld slurmd srun scontrol; do command -v "$t" >/dev/null || { echo "no $t" >&2; exit 77; }; done
hosts=$(awk '/^10\.99/ {print $2}' /etc/hosts); d=$PWD/slurm
mkdir -p "$d/state"; head -c 1024 /dev/urandom >"$d/munge.key"; chmod 400 "$d/munge.key"
cat >"$d/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=n1
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$d/state
SlurmdSpoolDir=$d/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$d/slurmctld.log
SlurmdLogFile=$d/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$(echo $hosts | tr ' ' ,) CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$d/slurm.conf
node="mkdir -p -m 755 /run/munge && munged --force --key-file=$d/munge.key --socket=/run/munge/munge.socket.2 --log-file=/run/munge/log --pid-file=/run/munge/pid --seed-file=/run/munge/seed --num-threads=2"
for h in $hosts; do ssh "$h" "$node"; done
slurmctld
for h in $hosts; do ssh "$h" "SLURM_CONF=$SLURM_CONF slurmd"; done
trap 'for h in $hosts; do ssh "$h" "pkill -x slurmd; pkill -x slurmstepd; pkill -x munged" || true; done; pkill -x slurmctld || true' EXIT
timeout 60 bash -c "until [ \"\$(sinfo -h -N -t idle -o %N | wc -l)\" = $(echo $hosts | wc -w) ]; do sleep 0.2; done" || { sinfo >&2; cat "$d"/*.log >&2; exit 70; }
"$@"
