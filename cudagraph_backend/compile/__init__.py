"""Compile time: once per region. Reads its graph, decides what is captured and padded, and lets Inductor compile it."""
