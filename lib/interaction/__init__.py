"""Corrections by clicks and scribbles: prompts, what they change, and how the changes enter a mask."""
