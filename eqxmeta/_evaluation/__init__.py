"""How well a model adapts: in numbers, and in pictures."""
