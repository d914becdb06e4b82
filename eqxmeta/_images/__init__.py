"""Images as arrays: how they are read, what one of them is to a model, and many with labels."""
