"""Weights on disk: where they are found, versions, calibration and provenance."""
