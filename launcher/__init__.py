"""What ``run.py`` does: install, start, test and check.

Standard library only, because it runs before anything is installed.
"""
