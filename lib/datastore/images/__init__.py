"""What of a studies folder is an image that can be segmented, and what is not."""
