"""Presents image files as DICOM series, for viewers that only show DICOM."""
