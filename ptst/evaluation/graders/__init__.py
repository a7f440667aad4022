"""Guard models and graders as judges: their prompts, how their replies are read, and who answers, a model or an API."""
