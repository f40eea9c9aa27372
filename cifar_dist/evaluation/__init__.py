"""Evaluate a model and write evaluation reports."""
