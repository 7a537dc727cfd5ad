"""Run a comparison as cells that any number of workers, on any number of machines, take from a shared folder."""
