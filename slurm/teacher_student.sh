#!/usr/bin/env bash
# bash slurm/teacher_student.sh TEACHER_RECIPE STUDENT_RECIPE [section.key=value of the student ...]
# Submit three dependent jobs: train the teacher, cache its logits, train the student. Run it on a host with
# sbatch; it returns at once. SBATCH_* variables and these options apply to all jobs:
#   SBATCH_OPTIONS="--account=A --nodes=2" bash slurm/teacher_student.sh ...
# The second job is omitted unless the student has teacher.placement `cached`.
set -eu -o pipefail
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0"
    exit 2
fi
teacher=$1 student=$2
shift 2
here=$(dirname "$0")
options=(${SBATCH_OPTIONS:-}) # unquoted: several
[ -d .venv ] && . .venv/bin/activate
plan=$(python -m cifar_dist.train --dry-run --json "$student" "$@")
placements=$(python -c '
import json, sys
recipe = json.load(sys.stdin)["recipe"]
for teacher in recipe["teachers"] or [recipe["teacher"]]:
    if teacher:
        print(teacher["placement"])' <<<"$plan")
if [ -z "$placements" ]; then
    echo "$student has no teacher" >&2
    exit 2
fi

after=$(sbatch --parsable "${options[@]}" --job-name=teacher "$here/train.sh" "$teacher")
echo "teacher: job $after"
if grep -qx cached <<<"$placements"; then
    after=$(sbatch --parsable "${options[@]}" --job-name=cache --dependency="afterok:$after" \
        --kill-on-invalid-dep=yes --export=ALL,MODULE=cifar_dist.cache_logits \
        "$here/train.sh" "$student" "$@")
    echo "its logits: job $after"
fi
after=$(sbatch --parsable "${options[@]}" --job-name=student --dependency="afterok:$after" \
    --kill-on-invalid-dep=yes "$here/train.sh" "$student" "$@")
echo "student: job $after"
