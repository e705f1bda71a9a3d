"""Annotated images from files: COCO's JSON, columns of objects, drawn scenes, and what the numbers of a box mean."""
