"""lmms-eval: our model for it, its tasks as samples, and its results as entries of a card."""
