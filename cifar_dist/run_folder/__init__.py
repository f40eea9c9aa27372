"""Files in a run folder: checkpoints, records, results."""
