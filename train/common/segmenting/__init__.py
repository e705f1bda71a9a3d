"""Semantic segmentation: images with masks of class ids, heads on a dense backbone, sliding windows, mIoU, export."""
