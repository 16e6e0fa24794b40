"""At home in other people's code: a loop, a Trainer or an engine of one's own, without our trainer or settings file."""
