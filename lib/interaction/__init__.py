"""Interactive correction by clicks and scribbles: prompts, the changes that they ask for, and how changes are merged
into a mask.
"""
