"""Data sets that come with the package: word problems, harmful requests, benign look-alikes, the alignment set."""
