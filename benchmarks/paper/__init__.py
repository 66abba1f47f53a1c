"""The paper's models, data and protocol, and its claims as experiments; ``docs/paper.md`` says what came out."""
