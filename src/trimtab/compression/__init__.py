"""The weights seam: which numbers are stored for a model's matrices. One file a method."""
