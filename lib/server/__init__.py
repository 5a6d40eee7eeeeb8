"""The FastAPI app around MONAI Label's own."""
