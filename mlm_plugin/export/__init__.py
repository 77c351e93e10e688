"""Files that other programs load: names, tensors, metadata."""
