"""One module per command of `vlm2vec` that is more than a few lines: its arguments, its help, and what it says at the end."""
