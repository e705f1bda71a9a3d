"""Weights of others, brought by `timm-dseq get` and kept on this machine."""
