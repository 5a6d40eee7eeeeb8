"""Segmentation, active learning and retraining with UNETR, as parts that a notebook can call.

Only the ``task`` modules and ``lib.server`` know MONAI Label; everything else is PyTorch and MONAI.
"""
