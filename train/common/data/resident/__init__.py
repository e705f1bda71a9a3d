"""Images decoded once into a file of pixels, and batches cropped from it."""
