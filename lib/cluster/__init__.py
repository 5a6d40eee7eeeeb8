"""Segmenting many images from the command line, without a server: the worker."""
