"""The one door for inference: requests are checked when they come, and answered in their turn on a device."""
