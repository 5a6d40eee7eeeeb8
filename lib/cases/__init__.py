"""Labelled cases: reading, subjects and splits, metrics, published data sets."""
