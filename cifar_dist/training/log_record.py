"""Write one record to metrics.jsonl, W&B and the terminal."""

from __future__ import annotations

from cifar_dist.run_folder.records import MetricsFile, Record
from cifar_dist.tracking.tracker import Tracker
from cifar_dist.utils.log import log


def log_record(line: Record, metrics_file: MetricsFile, tracker: Tracker, *, epochs: int) -> None:
    """One line of metrics.jsonl to the file, to W&B and to people."""
    metrics_file.append(line)
    tracker.log(line)
    log.info(format_record(line, epochs=epochs))


def format_record(line: Record, *, epochs: int) -> str:
    """One line of metrics.jsonl for people."""
    head = f"epoch {line['epoch']:6.2f}/{epochs}  step {line['step']:>6}"
    if line["kind"] == "train":
        return (
            f"{head}  loss {line['loss']:.4f}  top1 {line['top1']:5.2f} %  lr {line['lr']:.2e}  "
            f"{line['images_per_second']:,.0f} images/s  {line['memory_bytes'] / 2**30:.2f} GiB"
        )
    held = f"  val top1 {line['val_top1']:.2f} %" if "val_top1" in line else ""
    return f"{head}  test: loss {line['loss']:.4f}  top1 {line['top1']:.2f} %  top5 {line['top5']:.2f} %{held}"
