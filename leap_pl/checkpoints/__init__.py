"""Write, find, read, rewind and mend checkpoints, and save one when a signal ends the run."""
