"""A trained strategy at work: photographs in, names out."""
