"""Labelled data sets: both splits, their classes, subsets, and the names of known ones."""
