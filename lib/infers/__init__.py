"""Inference: segmentation of a volume by a network."""
