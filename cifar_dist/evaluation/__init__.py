"""Evaluate a model and describe the result."""
