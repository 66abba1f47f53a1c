import importlib.metadata

project = "torch-flowprune"
author = "torch-flowprune contributors"
copyright = "2026, torch-flowprune contributors"  # noqa: A001 - Sphinx's name for it
release = version = importlib.metadata.version("torch-flowprune")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"torch-flowprune {release}"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True


def _bars(app, what, name, obj, options, lines):
    """|θ g| is an absolute value here, never a substitution of reStructuredText."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _bars)
