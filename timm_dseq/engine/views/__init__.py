"""WHICH IMAGE: several crops of an image, each seen through a few windows, recognise one another among other images'.

A view costs no more than the patches it keeps: four views of a quarter cost what one whole crop costs.
"""
