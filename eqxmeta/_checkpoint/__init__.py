"""Checkpoint files: how they are written, read, checked and named."""
