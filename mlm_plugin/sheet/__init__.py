"""`mlm-plugin sheet`: a contact sheet of a finished LoRA, prompts by strengths."""
