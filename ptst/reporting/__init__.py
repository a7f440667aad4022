"""The report: one page for whoever must be convinced, made of a folder of results; nothing is measured here."""
