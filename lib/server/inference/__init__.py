"""The only entry to inference: requests are validated on arrival, and wait in a queue for a device."""
