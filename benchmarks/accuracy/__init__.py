"""What pruning does to networks that have learned something."""
