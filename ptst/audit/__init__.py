"""Checks of what reaches the loss: rules, findings, reports."""
