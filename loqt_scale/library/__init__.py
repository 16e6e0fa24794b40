"""LoQT in other people's loops: what is not needed by a run of our own."""
