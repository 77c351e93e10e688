"""The pocket world: little pictures with exact labels, and a diffusion model trained on them."""
