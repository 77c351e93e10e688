"""`mlm-plugin pocket`: a concept learned on the built-in model, where the truth is known."""
