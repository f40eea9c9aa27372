#!/usr/bin/env bash
# sbatch [sbatch options] slurm/doctor.sh [RECIPE] [section.key=value ...]
# Five minutes on the nodes, GPUs and folders that slurm/train.sh would get with the same options: a
# table of what was found, exit code 2 where something is in the way.
#SBATCH --job-name=cifar_dist_doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:05:00
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -d .venv ] && . .venv/bin/activate
[ $# -eq 0 ] && set -- recipes/r50_224.yaml

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((15000 + SLURM_JOB_ID % 17000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
exec srun --kill-on-bad-exit=1 python -m cifar_dist.doctor "$@"
