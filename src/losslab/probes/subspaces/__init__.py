"""Training in random subspaces, and the search for the smallest that does."""
