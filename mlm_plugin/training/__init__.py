"""The training loop and its parts. Takes objects, not flags."""
