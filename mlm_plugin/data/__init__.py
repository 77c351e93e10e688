"""Prompts, masks and pictures: everything that becomes a batch. Knows no model."""
