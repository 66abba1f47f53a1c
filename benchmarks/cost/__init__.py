"""Time and memory: of a prune and of scoring, beside peers and goals, and of the model that is left."""
