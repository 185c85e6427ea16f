"""Tuning: the recipe that is fastest within a quality bound, or best within a budget, proved on held-out questions."""
