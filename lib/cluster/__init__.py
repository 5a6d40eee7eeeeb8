"""Segmentation of many images from the command line, without a server, on one machine or a cluster."""
