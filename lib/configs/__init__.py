"""Presets and settings: immutable records that are validated when they are created."""
