"""Several processes that work on one run: which of them this is, joining them, and what they tell each other."""
