"""Files of images: opened so that no other file is, their headers parsed once and strictly, their bytes checked."""
