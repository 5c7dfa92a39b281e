#!/usr/bin/env bash
# A run under Slurm, submitted from the clone; the job's options can be overridden on sbatch's command line:
#
#     sbatch --nodes=2 launch/slurm.sh align --policy models/base --data prompts.jsonl --annotator judges:prefer \
#         --mesh data=2,fsdp=8 --run mine
#
# A job that is preempted or reaches its time limit is queued again and continues the run; one that is cancelled is not.
#SBATCH --job-name=jaxrlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
set -euo pipefail

# Slurm runs a copy of this script, in the folder from which it was submitted.
if [ ! -f launch/run.sh ]; then
    echo "launch/slurm.sh: submit it from the folder of the clone; there is no launch/run.sh in $PWD." >&2
    exit 2
fi
if [ -d .venv/bin ]; then
    PATH=$PWD/.venv/bin:$PATH
fi
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    export PROCESSES=auto
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

limit=""
# Five minutes before the time limit: the current step is completed and saved. srun itself would kill the tasks at SIGTERM.
trap 'limit=reached; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# When Slurm preempts or cancels the job, it signals the tasks too; this script waits for them.
trap : TERM

srun bash launch/run.sh "$@" &
step=$!
status=0
wait "$step" || status=$?
# A trapped signal ends `wait` before srun has ended.
while kill -0 "$step" 2> /dev/null; do
    status=0
    wait "$step" || status=$?
done

# A job that ends by itself within the time that a preemption leaves it counts as failed, unless it is queued again here.
job=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2> /dev/null || true)
case "$job" in
*JobState=CANCELLED*) limit="" ;;
*PreemptTime=[0-9]*) limit=preempted ;;
esac
if [ -n "$limit" ] && [ "$status" != 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        echo "launch/slurm.sh: the job was queued ${SLURM_RESTART_COUNT} times again, and the run is not at its end." >&2
        exit "$status"
    fi
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
