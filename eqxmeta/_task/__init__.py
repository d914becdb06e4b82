"""Tasks, where they come from, and how many of them are computed at a time."""
