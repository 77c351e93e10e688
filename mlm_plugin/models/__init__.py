"""Text encoders, checkpoints, networks and the contextualizer. Knows no trainer."""
