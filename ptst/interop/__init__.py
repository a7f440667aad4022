"""Other tools' ways in: inspect_ai and lm-eval run models of this project, under its templates, as their own."""
