"""What is wrong with a document: the likely cause of its difference from the reference."""
