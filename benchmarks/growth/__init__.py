"""How time and memory grow when one thing grows."""
