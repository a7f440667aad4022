"""Tasks, judges, statistics and the report."""
