#!/usr/bin/env bash
# sbatch --array=0-3 [sbatch options] slurm/sweep.sh SWEEP.yaml [options of cifar_dist.sweep]
# Train the trials of a sweep with one worker per array task. A worker is requeued like slurm/train.sh; its trial
# is resumed by itself or by another worker. Example, with two GPUs for each trial:
#   sbatch --array=0-3 --gpus-per-node=2 slurm/sweep.sh sweeps/r18_32_lr.yaml --processes 2
#SBATCH --job-name=cifar_dist_sweep
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
MODULE=cifar_dist.sweep exec bash slurm/train.sh "$@"
