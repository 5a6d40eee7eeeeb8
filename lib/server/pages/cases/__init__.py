"""The page of a case: its slices, its label versions, and corrections by clicks."""
