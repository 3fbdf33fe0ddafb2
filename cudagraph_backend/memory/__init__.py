"""The output pool, what is alive in it, and how arguments get there."""
