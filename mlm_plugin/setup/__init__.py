"""From options to the parts of a run."""
