"""Pretraining: its settings, the model on its device, the step, the log, the export."""
