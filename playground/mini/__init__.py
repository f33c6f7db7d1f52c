"""The miniature world: real pretrained parts and synthetic scenes, small enough for two CPU cores."""
