"""DICOM input and output: series, segmentations and DICOMweb."""
