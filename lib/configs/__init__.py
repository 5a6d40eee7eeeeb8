"""Presets and settings: immutable, checked when made."""
