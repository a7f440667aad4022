"""The training loop, optimizer and schedule, and the run folder."""
