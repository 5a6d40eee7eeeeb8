"""What clinicians submit: label names, grids, the store."""
