"""The contract of callbacks, and what several of them share."""
