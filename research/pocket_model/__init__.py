"""Trains the pocket model that ships with the package."""
