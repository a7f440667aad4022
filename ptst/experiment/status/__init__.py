"""Where a folder of work is: what is done, by whom the rest is done, how long it takes. Nothing here imports torch."""
