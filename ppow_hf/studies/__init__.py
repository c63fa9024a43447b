"""Recipes of training against each other."""
