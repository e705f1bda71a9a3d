"""What dense tasks share: a ViT as a backbone of any image size with windows, its pyramid, and one training run."""
