"""Chooses thresholds for a model: the most compression within a loss that a user allows."""
