"""The annotation pipeline: from a folder of images to a checked Patch-Aligned Dataset."""
