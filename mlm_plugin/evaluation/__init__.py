"""Measures of what a training gave: pictures, text states, and a report to look at."""
