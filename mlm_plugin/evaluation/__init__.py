"""Measures of a trained concept: pictures, text encoder states, and report pages."""
