"""Optimizers, schedules, SAM and weight averaging."""
