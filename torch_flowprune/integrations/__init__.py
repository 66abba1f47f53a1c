"""Frameworks that train models: one module each, named as the framework is, and imported on request only."""
