"""Scoring of new weights, and the decision whether they replace the live ones."""
