"""Does a saliency map find objects, and does a classifier need what it marks: truth, maps, predictions, measures."""
