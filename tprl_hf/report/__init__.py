"""Pages of training runs and of evaluations, made of the files that these write. Imports no torch."""
