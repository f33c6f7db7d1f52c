"""RAM and RAM++ (Recognize Anything): which of some thousand tags an image shows."""
