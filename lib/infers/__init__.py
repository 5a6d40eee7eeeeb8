"""Segmenting a volume on request."""
