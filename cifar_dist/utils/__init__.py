"""Helpers that know nothing about training: errors, files, keyed random numbers, YAML."""
