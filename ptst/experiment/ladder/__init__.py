"""The ladder: a study of defences over test prompts at increasing distance from the training prompt."""
