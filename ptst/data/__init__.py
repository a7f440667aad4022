"""From data to packed sequences (sources -> examples -> mix -> order -> packing), and prompt sets for evaluation."""
