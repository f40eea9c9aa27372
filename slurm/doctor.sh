#!/usr/bin/env bash
# sbatch [sbatch options] slurm/doctor.sh [RECIPE] [section.key=value ...]
# Check the nodes, GPUs and folders that slurm/train.sh would use with the same options, within five
# minutes. Prints one line per check; exits with code 2 if a check fails.
#SBATCH --job-name=cifar_dist_doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:05:00
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
MODULE=cifar_dist.doctor exec bash slurm/train.sh "$@"
