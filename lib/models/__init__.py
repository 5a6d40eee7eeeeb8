"""Weights on disk: location, versions, calibration and provenance."""
