"""Every row accounted for, from the data to the optimizer steps."""
