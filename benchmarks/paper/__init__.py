"""The paper's models, data and protocol, and its claims as experiments: see ``docs/results/paper.md``."""
