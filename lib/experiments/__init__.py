"""Comparisons and simulations that a running app never reaches."""
