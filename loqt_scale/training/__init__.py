"""One training job: its loop, the folder it works in, and whatever can end it. Loads without torch (`job` does not)."""
