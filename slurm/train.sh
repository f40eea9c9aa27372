#!/usr/bin/env bash
# sbatch [sbatch options] slurm/train.sh [RECIPE] [section.key=value ...]
# One task a GPU; without arguments: recipes/r50_224.yaml. Nodes, GPUs, time, partition, account are
# sbatch's own options, for instance `sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 ...`.
# A run that Slurm warns (--signal) saves, and the job is queued again under its id; so is a preempted
# one, by Slurm. One that is cancelled saves, too, and stays cancelled.
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
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -d .venv ] && . .venv/bin/activate

if [ $# -eq 0 ]; then set -- recipes/r50_224.yaml; fi

# The first host's address and a port of the job's own; tasks derive their ranks from SLURM_*.
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Where the recipe writes its run folder, asked of the program itself.
run_folder=$(python -m cifar_dist.train --dry-run "$@" | sed -n 's/^run folder  *//p')
[ -n "$run_folder" ] || exit 2

# The script outlives the TERM that it may get together with its tasks, until they have saved.
trap 'echo "slurm/train.sh: TERM, waiting for the tasks to save"' TERM
# A Python process dies of USR1 before it has a handler, so tasks begin with USR1 blocked and unblock
# it themselves (signals.py).
blocked=()
env --block-signal=USR1 true 2>/dev/null && blocked=(env --block-signal=USR1)
srun --kill-on-bad-exit=1 "${blocked[@]}" python -m cifar_dist.train "$@" &
wait_for=$!
code=1
while kill -0 "$wait_for" 2>/dev/null; do
    wait "$wait_for"
    code=$?
done

# USR1 is Slurm's warning of the time limit. After TERM Slurm itself queues a preempted job again, and
# a cancelled one shall stay so.
if [ "$(cat "$run_folder/stopped" 2>/dev/null)" = SIGUSR1 ]; then
    echo "slurm/train.sh: saved before the time limit; queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
