"""Helpers without knowledge of training: errors, files, keyed randomness, YAML."""
