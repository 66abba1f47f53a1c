"""How many architectures couple, prune and shrink, and whether what is left computes the same; beside Torch-Pruning.

`models`: which ones, and how they are built. `trial`: one model and one tool. `page`: the table. `__main__`: all of
them, a process each.
"""
