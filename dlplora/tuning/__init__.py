"""Choose settings of a method on the validation split: a small grid, one record per trial."""
