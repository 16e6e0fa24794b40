"""This process and what surrounds it: its launcher, variables, streams, error log, caller. Loads without torch."""
