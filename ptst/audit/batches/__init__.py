"""Batches of any trainer, with and without the messages that they were made from."""
