"""The report as a page and as files for other programs."""
