"""The inner loop, and the derivatives through it."""
