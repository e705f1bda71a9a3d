"""What every run has: length and schedules, the optimiser step, checkpoints, resuming, log, results and export."""
