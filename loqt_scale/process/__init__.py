"""This process and what surrounds it: its launcher, variables, standard streams, error log, caller. Loads without torch."""
