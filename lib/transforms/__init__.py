"""From a file to what the network sees, and back."""
