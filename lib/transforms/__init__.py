"""Transforms between image files and the input and output of the network."""
