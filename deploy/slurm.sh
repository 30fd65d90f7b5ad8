#!/bin/bash
# PPO on an allocation of SLURM: a Ray cluster over its nodes for as long as the job runs. From a checkout that all nodes see:
#
#   sbatch --nodes=1 --gpus-per-node=8 deploy/slurm.sh configs/ppo.yaml run=gsm
#
# Five minutes before its time is over, or when it is cancelled with `scancel --signal=TERM --batch`, the job commits its last whole
# step and ends with 0. The same command, or `scontrol requeue`, goes on where checkpoint.resume=auto says.
#SBATCH --job-name=minigpt-ray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
source .venv/bin/activate
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')      # of this allocation alone; srun hands it on
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_worker_niceness=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} others=$((${#nodes[@]} - 1))
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c 'hostname --ip-address; hostname --all-ip-addresses' |
    awk '{ for (i = 1; i <= NF; i++) if (!found && $i ~ /^[0-9.]+$/ && $i !~ /^(127|169[.]254|172[.]17)[.]/) found = $i } END { print found }')
: "${address:?no IPv4 address of $head but those of the loopback}"

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --node-ip-address="$address" --port=6379 --block &
for _ in $(seq 60); do
    ray health-check --address="$address:6379" > /dev/null 2>&1 && break
    sleep 2
done
if [ "$others" -gt 0 ]; then
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$address:6379" --block &
fi

RAY_ADDRESS="$address:6379" python -m jobs.ppo placement.wait_seconds=300 "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do                # a signal ended the waiting, not the driver
    code=0
    wait "$driver" || code=$?
done
exit "$code"
