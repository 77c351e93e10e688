"""Options: declared once, read from flags and TOML files. Does not import torch."""
