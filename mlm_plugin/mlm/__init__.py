"""The method of arXiv 2410.10058: all of it, and nothing of any trainer."""
