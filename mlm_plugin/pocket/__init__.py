"""The pocket world: small pictures with exact labels, and a diffusion model trained on them."""
