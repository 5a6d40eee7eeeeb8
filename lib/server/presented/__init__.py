"""Files, and series that viewers cannot show, presented as DICOM series."""
