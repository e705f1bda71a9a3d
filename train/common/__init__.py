"""What the recipes share: order and randomness, data, schedules, checkpoints, monitors, pictures."""
