#!/usr/bin/env bash
# sbatch [sbatch options] slurm/train.sh [RECIPE] [section.key=value ...]
# One task a GPU; without arguments: recipes/r50_224.yaml. Nodes, GPUs, time, partition, account and
# container are sbatch's own options: `sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 ...`.
# A log file for each rank: `RANK_LOGS=logs/%j_%t.txt sbatch ...`.
#
# The job is queued again under its id when Slurm warns of the time limit, when it is preempted, and
# when it crashed but saved something new since it started. A cancelled job saves and stays cancelled.
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

# The script outlives signals that reach it beside its tasks, until these have saved.
again=yes
trap 'again=yes' TERM USR1

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -d .venv ] && . .venv/bin/activate
[ $# -eq 0 ] && set -- recipes/r50_224.yaml

# The first host's address, and a port on which nobody listens there (this script runs on that host);
# tasks derive their ranks from SLURM_*.
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_ADDR=${MASTER_ADDR:-$first_host}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))
while (: <>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((MASTER_PORT + 1))
done
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since 22.05 srun has to be told

# NCCL finds its way by itself on most clusters. Where it does not, set before sbatch:
#   NCCL_SOCKET_IFNAME=ib0   the interface of the fast network, if it picks a slow one (`ip addr`)
#   GLOO_SOCKET_IFNAME=ib0   the same for gloo, by which ranks agree beside NCCL; by default the host name's
#   NCCL_IB_DISABLE=1        no InfiniBand, although NCCL believes in one
#   NCCL_DEBUG=INFO          what it found and chose
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A Python process dies of a signal before it has a handler, so tasks begin with these two blocked and
# unblock them themselves (signals.py). --wait: a task that left early ends the others.
options=(--kill-on-bad-exit=1 --wait=60)
[ -n "${RANK_LOGS:-}" ] && mkdir -p "$(dirname "$RANK_LOGS")" && options+=(--output="$RANK_LOGS")
blocked=()
env --block-signal=USR1,TERM true 2>/dev/null && blocked=(env --block-signal=USR1,TERM)
started=@$(date +%s)
srun "${options[@]}" "${blocked[@]}" python -m "${MODULE:-cifar_dist.train}" "$@" &
tasks=$!
while [ "$again" ]; do # a signal ends `wait`, not srun
    again=
    wait "$tasks"
    code=$?
done

[ "$code" = 0 ] || [ "$code" = 2 ] && exit "$code" # finished; a mistake in the recipe

# The controller may be busy, or away for a while.
ask() {
    for pause in 1 2 4 8 15 30 60 0; do
        "$@" && return
        sleep $pause
    done
    echo "slurm/train.sh: Slurm's controller did not answer for two minutes, so this job is not" \
        "queued again; what was saved is complete: submit it again, and it goes on" >&2
    return 1
}
# One task of an array has the array's own number, to which all of them answer.
mine() { grep "^JobId=$SLURM_JOB_ID "; }
field() { grep -o " $1=[^ ]*" <<<"$job" | cut -d = -f 2; }
job=$(ask scontrol --oneliner show job "$SLURM_JOB_ID" | mine) || exit "$code"
task=$(field ArrayTaskId)
alone=${task:+$(field ArrayJobId)_$task} # what names it and no other
alone=${alone:-$SLURM_JOB_ID}
[ "$(field JobState)" = RUNNING ] || exit "$code" # cancelled, or Slurm itself queues it again

# Where the recipe writes its run folder, asked of the program itself; what is new in it.
run_folder=$(python -m cifar_dist.train --dry-run --json "$@" 2>/dev/null |
    python -c 'import json, sys; print(json.load(sys.stdin)["run_folder"])')
new() { find "$run_folder"/$1 -maxdepth 0 -newermt "$started" 2>/dev/null | tail -n 1; }
stopped=$(cat "$(new stopped)" /dev/null 2>/dev/null)
preempted=$(field PreemptTime) # where nobody can be preempted there is no such field
if [ "$stopped" = SIGUSR1 ] || [ "$stopped$code" = 75 ]; then # MODULE leaves only its exit code
    why="saved before the time limit"
elif [ "${preempted:-None}" != None ]; then
    why="preempted" # Slurm forgets to requeue a job that ends within its grace time
elif [ -z "$stopped" ] && [ "$(new 'checkpoints/step_*')" ]; then
    why="crashed with code $code after it had saved $(new 'checkpoints/step_*')"
else
    exit "$code"
fi
echo "slurm/train.sh: $why; queued again"
requeue() { # unless Slurm has done it by now
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID" | mine) || return
    [ "$(field JobState)" != RUNNING ] || scontrol requeue "$alone"
}
ask requeue
exit "$code"
