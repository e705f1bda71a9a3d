"""The method, one file a step: saliency → regions → plans → packing → predictor → loss.

The engine knows neither the Hub nor files, and nothing of training.
"""
