"""What is done with a finished PAD file: check it, count it, look at it, join it with captions, publish it."""
