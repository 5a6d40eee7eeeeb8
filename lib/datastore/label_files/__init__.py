"""The files of labels: reading them with the names in their headers, and what somebody puts into labels/final."""
