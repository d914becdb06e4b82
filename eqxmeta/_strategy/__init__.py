"""The contract of strategies, and what several of them share."""
