"""How much memory a training will need, counted on the meta device before anything is loaded."""
