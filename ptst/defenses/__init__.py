"""Defences against the loss of safety by fine-tuning: how they are named and set, and those that act on the weights."""
