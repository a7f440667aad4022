"""The sampler and its key/value cache."""
