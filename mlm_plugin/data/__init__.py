"""Pictures, captions and latents: everything that becomes a batch. Knows no model."""
