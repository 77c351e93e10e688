"""Options: declared once, read from flags and TOML files. Knows no torch."""
