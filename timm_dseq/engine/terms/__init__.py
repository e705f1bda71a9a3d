"""Losses that can be added to the prediction's."""
