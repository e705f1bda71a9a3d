"""Pretraining, looked at from outside: probes and pictures during the run, and the report."""
