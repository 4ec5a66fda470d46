#!/usr/bin/env bash
# Runs a command with a SLURM of its own on this machine: one node, loopback only, everything below one new folder, nothing
# left behind. Needs Debian's packages slurm-wlm and munge, and root (slurmd starts jobs for any user). Usage:
#
#     sudo benchmarks/slurm_single_node.sh .venv/bin/cxrkit grid run smoke --slurm resources.yaml
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }
for tool in munged slurmctld slurmd sbatch; do
  command -v "$tool" >/dev/null || { echo "there is no $tool; install slurm-wlm and munge" >&2; exit 2; }
done

base=$(mktemp -d)
host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
pids=()
finish() {
  squeue -h -o %i 2>/dev/null | xargs -r scancel 2>/dev/null || true
  for pid in $(printf '%s\n' "${pids[@]}" | tac); do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$base"
}
trap finish EXIT
trap 'exit 130' INT TERM

chmod 755 "$base"
mkdir -m 700 "$base"/{munge,state,spool}
head -c 1024 /dev/urandom > "$base/munge/key"
chmod 400 "$base/munge/key"
export SLURM_CONF="$base/slurm.conf"
cat > "$SLURM_CONF" <<CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$base/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
MailProg=/bin/true
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.pid
SlurmctldLogFile=$base/slurmctld.log
SlurmdLogFile=$base/slurmd.log
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

munged --foreground --force --key-file="$base/munge/key" --socket="$base/munge/socket" --pid-file="$base/munge/pid" \
  --log-file="$base/munge/log" --seed-file="$base/munge/seed" --num-threads=2 2> "$base/munge.err" &
pids+=($!)
for _ in $(seq 50); do [ -S "$base/munge/socket" ] && break; sleep 0.1; done
slurmctld -D -f "$SLURM_CONF" 2> "$base/slurmctld.err" &
pids+=($!)
slurmd -D -f "$SLURM_CONF" -N "$host" 2> "$base/slurmd.err" &
pids+=($!)
for _ in $(seq 150); do sinfo -h -o %t 2>/dev/null | grep -q '^idle' && break; sleep 0.2; done
if ! sinfo -h -o %t 2>/dev/null | grep -q '^idle'; then
  echo "SLURM did not come up:" >&2
  tail -n 15 "$base"/*.err "$base"/*.log "$base"/munge/log >&2 || true
  exit 1
fi
"$@"
