"""Segmentation of structures that are not drawn yet: a region for each click, and one structure from all clicks
together.
"""
