"""What a node of an FX graph runs, and which line of the user's made it."""
