"""Weights in and out: files of weights, what they are in stock timm, cards, download, convert, verify, push."""
