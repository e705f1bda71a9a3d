"""Detection and instance segmentation: annotated images, the detector, its AP, pictures, and the folder it ends in."""
