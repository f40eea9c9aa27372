#!/usr/bin/env bash
# sbatch --array=0-35 [sbatch options] slurm/table.sh [section.key=value ...]
# Train each of RECIPES with each of SEEDS, one array task each, requeued like slurm/train.sh. The default
# is the tutorial's table. `--array=0-35%4` runs four tasks at a time.
#   RECIPES="recipes/r18_32.yaml recipes/r9_32.yaml" SEEDS="0 1" sbatch --array=0-3 slurm/table.sh
# Prints the number of tasks if the array is too small or too large. Runs are named NAME_seed0, ... A recipe
# with a teacher needs the teacher's run first:
#   sbatch --ntasks-per-node=1 --gpus-per-node=1 slurm/train.sh recipes/kd/resnet32x4.yaml
# Then: python -m cifar_dist.report runs/*
#SBATCH --job-name=cifar_dist_table
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

recipes=(${RECIPES:-recipes/tutorial/*.yaml}) # unquoted: a pattern of files
seeds=(${SEEDS:-0 1 2})
tasks=$((${#recipes[@]} * ${#seeds[@]}))
task=${SLURM_ARRAY_TASK_ID:-}
if [ -z "$task" ] || [ "$task" -ge "$tasks" ]; then
    echo "slurm/table.sh: ${#recipes[@]} recipes x ${#seeds[@]} seeds: sbatch --array=0-$((tasks - 1))" >&2
    exit 2
fi
if [ "${SLURM_ARRAY_TASK_MAX:-$tasks}" -lt $((tasks - 1)) ]; then
    echo "slurm/table.sh: warning: --array ends at $SLURM_ARRAY_TASK_MAX, the table at $((tasks - 1))" >&2
fi
recipe=${recipes[task / ${#seeds[@]}]}
seed=${seeds[task % ${#seeds[@]}]}
name=$(sed -n "s/^name: *[\"']\{0,1\}\([^ \"']*\).*/\1/p" "$recipe")
exec bash slurm/train.sh "$recipe" "name=${name}_seed$seed" "run.seed=$seed" "$@"
