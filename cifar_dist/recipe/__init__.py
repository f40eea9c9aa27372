"""Recipes: schema, loading, comparison, dry run, look-up of runs."""
