"""Training runs: start, resume, several seeds at once."""
