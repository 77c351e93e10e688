"""`mlm-plugin doctor`: what a finished LoRA or embedding does to the sentences around it."""
