"""Files presented as DICOM series, for viewers that show nothing else."""
