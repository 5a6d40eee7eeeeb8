"""Label files: reading them with the names in their headers, and taking in files copied to labels/final."""
