"""Speed and memory: with and without the term, and compared with other trainers."""
