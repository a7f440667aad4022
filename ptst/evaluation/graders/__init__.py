"""Judges that are models: a grader's prompt, the reading of its replies, and who is asked."""
