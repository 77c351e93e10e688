"""The built-in prompt sets, and how such a file is read."""
