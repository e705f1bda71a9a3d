"""Results that the paper reports, quoted in model cards and by train/table.py; not measured here."""

# Top-1 in per cent unless the task names another measure: one figure for each of METHODS, or for the first of them.
METHODS = ("I-JEPA", "DSeq-JEPA", "C-JEPA", "DSeq-JEPA + contrastive")
RESULTS = {
    "dseq_jepa_vit_b16": {
        "ImageNet-1k, linear probe": ("72.4", "73.5", "73.5", "73.8"),
        "ImageNet-1k, fine-tuned": ("83.5", "84.0", "84.2", "84.3"),
        "iNat21-mini, linear probe": ("35.9", "36.4", "36.2", "36.6"),
        "CUB-200, linear probe": ("65.3", "66.2", "64.9", "66.5"),
        "Stanford Cars, linear probe": ("65.9", "67.3", "66.1", "67.4"),
        "COCO, box AP": ("49.9", "50.5", "50.7", "50.9"),
        "COCO, mask AP": ("44.5", "45.0", "45.3", "45.7"),
        "ADE20K, mIoU": ("47.6", "48.1", "48.7", "48.9"),
        "CLEVR, count": ("85.6", "86.4", "86.8", "87.1"),
        "CLEVR, distance": ("71.2", "71.5", "71.6", "71.9"),
    },
    "dseq_jepa_vit_h16_448": {
        "ImageNet-1k, linear probe": ("81.1", "82.4"),
        "ImageNet-1k, fine-tuned": ("87.1", "87.8"),
        "iNat21-mini, linear probe": ("38.9", "39.3"),
        "CUB-200, linear probe": ("67.2", "68.9"),
        "Stanford Cars, linear probe": ("67.7", "70.1"),
    },
}
