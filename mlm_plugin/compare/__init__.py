"""`mlm-plugin compare`: trainings with different options, compared on several subjects."""
