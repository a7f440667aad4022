"""The experiment as a whole: the matrix of training and test templates, and the alignment that comes before it."""
