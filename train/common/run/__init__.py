"""A run over time: its length and schedules, the optimiser step, checkpoints, resuming, log and results."""
