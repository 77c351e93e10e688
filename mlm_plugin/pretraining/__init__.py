"""Pretraining of contextualizers."""
