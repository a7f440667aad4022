"""Where examples come from (files, the hub, the built-in sets) and how they are packed into flat rows."""
