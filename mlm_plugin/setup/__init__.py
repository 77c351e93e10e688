"""From options to what a run is made of."""
