"""Measurements of the package: what it costs, which models it carries, what it does to accuracy; not installed."""
