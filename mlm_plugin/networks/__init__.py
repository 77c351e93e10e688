"""Networks on top of a frozen model: LoRA and LyCORIS, under kohya's names."""
