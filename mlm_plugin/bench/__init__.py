"""`mlm-plugin pocket bench`: methods and rivals on concepts whose truth is known."""
