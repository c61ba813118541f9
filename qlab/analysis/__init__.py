"""Measurements of a simulation that leave it as it was."""
