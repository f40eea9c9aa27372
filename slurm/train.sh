#!/usr/bin/env bash
# sbatch [sbatch options] slurm/train.sh [RECIPE] [section.key=value ...]
# Trains with one task per GPU; the default recipe is recipes/r50_224.yaml. Set nodes, GPUs, time,
# partition, account and container with sbatch options:
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/train.sh recipes/r50_224.yaml
#   RANK_LOGS=logs/%j_%t.txt sbatch slurm/train.sh    # one log file per rank
#
# The job is requeued under the same id before the time limit, after preemption, and after a crash if a
# checkpoint was saved since it started. A cancelled job saves a checkpoint and stays cancelled.
#SBATCH --job-name=cifar_dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

# Slurm signals this script along with its tasks. Wait until the tasks have saved.
waiting=yes
trap 'waiting=yes' TERM USR1

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -d .venv ] && . .venv/bin/activate
[ $# -eq 0 ] && set -- recipes/r50_224.yaml

# The address of the first host, which runs this script, and a free port on it. The tasks derive their
# ranks from SLURM_*.
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_ADDR=${MASTER_ADDR:-$first_host}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))
while (: <>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((MASTER_PORT + 1))
done
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not inherit it

# NCCL needs no settings on most clusters. Otherwise set before sbatch:
#   NCCL_SOCKET_IFNAME=ib0   the interface of the fast network (`ip addr`)
#   GLOO_SOCKET_IFNAME=ib0   the same for gloo, over which ranks poll each other; default: the host name's
#   NCCL_IB_DISABLE=1        do not use InfiniBand
#   NCCL_DEBUG=INFO          print what NCCL detects and selects
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A signal kills a Python process that has no handler yet, so the tasks start with these two signals
# blocked and unblock them (signals.py). --wait ends all tasks after one has exited early.
options=(--kill-on-bad-exit=1 --wait=60)
[ -n "${RANK_LOGS:-}" ] && mkdir -p "$(dirname "$RANK_LOGS")" && options+=(--output="$RANK_LOGS")
blocked=()
env --block-signal=USR1,TERM true 2>/dev/null && blocked=(env --block-signal=USR1,TERM)
started=@$(date +%s)
srun "${options[@]}" "${blocked[@]}" python -m "${MODULE:-cifar_dist.train}" "$@" &
tasks=$!
while [ "$waiting" ]; do # a signal ends `wait`, not srun
    waiting=
    wait "$tasks"
    code=$?
done

[ "$code" = 0 ] || [ "$code" = 2 ] && exit "$code" # finished, or a user error

# The controller may be busy or down for a while.
retry() {
    for pause in 1 2 4 8 15 30 60 0; do
        "$@" && return
        sleep $pause
    done
    echo "slurm/train.sh: the Slurm controller did not respond for two minutes, so this job was not" \
        "requeued; submit it again to resume from the last checkpoint" >&2
    return 1
}
# The last task of an array has the id of the whole array, for which scontrol lists all tasks.
this_job() { grep "^JobId=$SLURM_JOB_ID "; }
field() { grep -o " $1=[^ ]*" <<<"$job" | cut -d = -f 2; }
job=$(retry scontrol --oneliner show job "$SLURM_JOB_ID" | this_job) || exit "$code"
task=$(field ArrayTaskId)
unique_id=${task:+$(field ArrayJobId)_$task}
unique_id=${unique_id:-$SLURM_JOB_ID}
[ "$(field JobState)" = RUNNING ] || exit "$code" # cancelled, or requeued by Slurm

# `new PATTERN` prints a matching file in the run folder that was written since this job started.
run_folder=$(python -m cifar_dist.train --dry-run --json "$@" 2>/dev/null |
    python -c 'import json, sys; print(json.load(sys.stdin)["run_folder"])' 2>/dev/null)
new() { find "$run_folder"/$1 -maxdepth 0 -newermt "$started" 2>/dev/null | tail -n 1; }
stopped=$(cat "$(new stopped)" /dev/null 2>/dev/null)
preempted=$(field PreemptTime) # absent in partitions without preemption
if [ "$stopped" = SIGUSR1 ] || [ "$stopped$code" = 75 ]; then # other MODULEs write no file `stopped`
    why="saved before the time limit"
elif [ "${preempted:-None}" != None ]; then
    why="preempted" # Slurm does not requeue a job that exits within its grace time
elif [ -z "$stopped" ] && [ "$(new 'checkpoints/step_*')" ]; then
    why="crashed with code $code after saving $(new 'checkpoints/step_*')"
else
    exit "$code"
fi
echo "slurm/train.sh: $why; requeued"
requeue() { # unless Slurm has requeued it already
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID" | this_job) || return
    [ "$(field JobState)" != RUNNING ] || scontrol requeue "$unique_id"
}
retry requeue
exit "$code"
