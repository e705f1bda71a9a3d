"""The method, one file a step: saliency → regions → plans → packing → predictor → loss. It knows no Hub, no files."""
