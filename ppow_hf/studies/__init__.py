"""Recipes of training against each other: configuration, texts, runs (compare.py), evaluation, report, mean."""
