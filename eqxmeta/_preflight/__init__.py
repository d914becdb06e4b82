"""What can be found wrong, or counted, before a run."""
