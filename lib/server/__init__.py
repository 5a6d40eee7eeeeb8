"""The FastAPI application around MONAI Label's own."""
