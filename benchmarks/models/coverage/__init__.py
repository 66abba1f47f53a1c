"""How many architectures couple, prune and shrink, and whether what is left computes the same; beside Torch-Pruning."""
