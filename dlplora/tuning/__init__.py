"""Settings of a method chosen on the validation split: a small grid, one record a trial."""
