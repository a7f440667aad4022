"""From data files to packed sequences: sources -> examples -> mix -> order -> packing; prompt sets and ARC for tests."""
