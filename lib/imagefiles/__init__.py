"""Image files: safe opening, strict parsing of headers, and verified reading of voxels."""
