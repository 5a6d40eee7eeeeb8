"""DICOM in and out: series, segmentations, DICOMweb."""
