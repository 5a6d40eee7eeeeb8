"""Comparisons and simulations that are not part of a running server."""
