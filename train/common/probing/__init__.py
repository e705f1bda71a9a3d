"""Judging a frozen backbone: features, kNN, logistic regression, and heads trained as published."""
