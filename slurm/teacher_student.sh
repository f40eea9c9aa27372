#!/usr/bin/env bash
# bash slurm/teacher_student.sh TEACHER_RECIPE STUDENT_RECIPE [section.key=value of the student ...]
# Three jobs, each of which waits for the one before to finish well: the teacher is trained, its logits
# are cached for the student's recipe, the student is trained on them. Submits and returns; run it
# where sbatch is. SBATCH_* variables and these options hold for all three:
#   SBATCH_OPTIONS="--account=A --nodes=2" bash slurm/teacher_student.sh ...
# A student whose teacher.placement is not `cached` needs no second job and gets none.
set -eu -o pipefail
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# //p' "$0"
    exit 2
fi
teacher=$1 student=$2
shift 2
here=$(dirname "$0")
options=(${SBATCH_OPTIONS:-}) # unquoted: several
[ -d .venv ] && . .venv/bin/activate
plan=$(python -m cifar_dist.train --dry-run "$student" "$@")
placements=$(grep -o 'placement: [a-z]*' <<<"$plan" | cut -d ' ' -f 2) || {
    echo "$student has no teacher" >&2
    exit 2
}

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
