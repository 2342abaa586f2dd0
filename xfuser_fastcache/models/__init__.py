"""Models: how a family of transformers is called, cut and read."""
