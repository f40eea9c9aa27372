"""Losses, one class each."""
