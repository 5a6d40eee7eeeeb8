"""How new weights are scored, and whether they are served in place of those before."""
