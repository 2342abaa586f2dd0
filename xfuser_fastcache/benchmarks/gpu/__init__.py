"""What the cache costs and gains on one GPU, with random weights in the models' real shapes."""
