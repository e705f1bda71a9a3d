"""Monitoring of a pretraining run: probes and pictures while it learns, and the report at its end."""
