"""Write one record to metrics.jsonl, W&B and the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from cifar_dist.run_folder.records import MetricsFile, Record
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.utils.log import log


def log_record(
    record: Record,
    metrics_file: MetricsFile,
    tracker: Tracker,
    *,
    epochs: int,
    losses: Iterable[str],
) -> None:
    metrics_file.append(record)
    tracker.log(record)
    log.info(format_record(record, epochs=epochs, losses=losses))


def format_record(record: Record, *, epochs: int, losses: Iterable[str]) -> str:
    """Return the line of a record for the terminal; `losses` are the names of the recipe's losses."""
    head = f"epoch {record['epoch']:6.2f}/{epochs}  step {record['step']:>6}"
    if record["kind"] == "train":
        loss = f"{record['loss']:.4f}"
        terms = {name: f"{record[name]:.4f}" for name in losses}
        if list(terms.values()) != [loss]:  # several losses, or one with another weight than 1
            loss += f" ({', '.join(f'{name} {term}' for name, term in terms.items())})"
        return (
            f"{head}  loss {loss}  top1 {record['top1']:5.2f} %  "
            f"lr {record['lr']:.2e}  {record['images_per_second']:,.0f} images/s  "
            f"{record['memory_bytes'] / 2**30:.2f} GiB"
        )
    validation = f"  val top1 {record['val_top1']:.2f} %" if "val_top1" in record else ""
    return (
        f"{head}  test: loss {record['loss']:.4f}  top1 {record['top1']:.2f} %  "
        f"top5 {record['top5']:.2f} %{validation}"
    )
