"""Text encoders, checkpoints and their networks. Knows no trainer."""
