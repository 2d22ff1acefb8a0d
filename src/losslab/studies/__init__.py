"""Configuration, data, models, the training loop, run folders: the only layer that trains."""
