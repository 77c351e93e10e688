"""Methods, the MLM term and its rivals on concepts with known ground truth."""
