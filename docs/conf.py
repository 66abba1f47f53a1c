import importlib.metadata
import importlib.util
import pathlib

from sphinx.errors import ExtensionError

project = "torch-flowprune"
author = "torch-flowprune contributors"
copyright = "2026, torch-flowprune contributors"  # noqa: A001 - Sphinx's name for it
release = version = importlib.metadata.version("torch-flowprune")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"  # what is copied of a session is what one types
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}
html_theme = "furo"
html_title = f"torch-flowprune {release}"
exclude_patterns = ["_build", "gallery"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True


def _bars(app, what, name, obj, options, lines):
    """|θ g| is an absolute value here, never a substitution of reStructuredText."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def _public(app, env, node, contnode):
    """Docstrings refer to names where they are defined, ``torch_flowprune.flow.flow``.

    The reference has them where users find them.
    """
    package, _, name = node.get("reftarget", "").partition(".")
    if node.get("refdomain") != "py" or package != "torch_flowprune" or "." not in name:
        return None
    name = f"{package}.{name.rpartition('.')[2]}"
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, contnode)


def _host_table(app):
    """The rows of the host page are those that its tests bear."""
    path = pathlib.Path(__file__).parents[1] / "tests" / "support" / "host_table.py"
    spec = importlib.util.spec_from_file_location("host_table", path)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    if problems := table.problems():
        raise ExtensionError("explanation/host.md: " + "; ".join(problems))


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", _host_table)
    app.connect("autodoc-process-docstring", _bars)
    app.connect("missing-reference", _public)
