"""States, and what the library asks of the user's model."""
