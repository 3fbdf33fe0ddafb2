"""Call time: every call of a region, from its sizes and addresses to the launch and the outputs."""
