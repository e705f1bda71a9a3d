"""Fine-tuning: a backbone and its head, augmentation, testing, and the classifier it ends in."""
