"""Measurements of the package: what it costs, which models it carries, what it does to accuracy.

Not part of what is installed.
"""
