"""Training on annotated images, which fine-tuning and the dense tasks share: a run, its steps, its log."""
