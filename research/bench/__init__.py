"""Methods, the MLM term and its rivals on concepts whose truth is known."""
