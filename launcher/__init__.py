"""Implementation of ``run.py``: installation, start, tests and checks.

It uses the standard library only, because it runs before anything is installed.
"""
