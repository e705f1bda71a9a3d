"""Fine-tuning: a backbone and its head, augmentation, scoring, and the classifier it ends in."""
