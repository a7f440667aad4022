"""The tasks: prompts out, answers in, figures out. A new task is one file here and one entry in `table.TASKS`."""
