"""This process and what surrounds it: its launcher, its standard streams, its error log. Loads without torch."""
