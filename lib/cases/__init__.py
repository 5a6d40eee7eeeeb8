"""Labelled cases: reading, subjects and splits, metrics, and public data sets."""
