"""The devices of this process: scheduling of work on them, and handling of devices that fail."""
