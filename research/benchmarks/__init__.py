"""Speed and memory: the term on and off, and this trainer beside others."""
