"""Models of other libraries through a whole life: pruned, shrunk, trained, pruned again, saved, exported."""
