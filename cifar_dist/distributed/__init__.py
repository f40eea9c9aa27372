"""Processes, ranks and how they agree."""
