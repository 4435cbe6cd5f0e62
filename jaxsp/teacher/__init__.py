"""The teacher: the frozen model reading the whole context."""
