"""A page on which to play with what visual tokens mean: `patch-aligned explore`."""
