import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys

from sphinx.addnodes import pending_xref
from sphinx.errors import ExtensionError

sys.path.insert(0, str(pathlib.Path(__file__).parent / "extensions"))

project = "torch-flowprune"
author = "torch-flowprune contributors"
copyright = "2026, torch-flowprune contributors"  # noqa: A001 - Sphinx's name for it
release = version = importlib.metadata.version("torch-flowprune")

extensions = [
    "keyword_descriptions",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxext.opengraph",
]
ogp_social_cards = {"enable": False}
if "READTHEDOCS" in os.environ:  # a build without a network links to no other project
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
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
# The address of the repository is said once, in pyproject.toml: with it each page has an edit link.
urls = dict(
    entry.split(", ", 1) for entry in importlib.metadata.metadata("torch-flowprune").get_all("Project-URL") or ()
)
html_theme_options = (
    {"source_repository": urls["Repository"], "source_branch": "main", "source_directory": "docs/"}
    if "Repository" in urls
    else {}
)
html_title = f"torch-flowprune {release}"
exclude_patterns = ["_build", "gallery"]
templates_path = ["_templates"]
autosummary_generate = True  # a page for each object of the API reference
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


def _torchs_names(app, doctree):
    """Annotations say ``nn.Module`` and ``Tensor``; torch's reference has them in full."""
    for node in doctree.findall(pending_xref):
        target = node.get("reftarget", "")
        if node.get("refdomain") == "py" and (target == "Tensor" or target.startswith("nn.")):
            node["reftarget"] = f"torch.{target}"


def _host_table(app):
    """The rows of the host page are those that its tests bear."""
    path = pathlib.Path(__file__).parents[1] / "tests" / "support" / "host_table.py"
    spec = importlib.util.spec_from_file_location("host_table", path)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    if problems := table.problems():
        raise ExtensionError("explanation/host.md: " + "; ".join(problems))


def _no_stale_pages(app, config):
    """Pages of names that are gone."""
    shutil.rmtree(pathlib.Path(app.srcdir) / "reference" / "objects", ignore_errors=True)


def setup(app):
    """Called by Sphinx."""
    app.connect("config-inited", _no_stale_pages)
    app.connect("builder-inited", _host_table)
    app.connect("autodoc-process-docstring", _bars)
    app.connect("missing-reference", _public)
    app.connect("doctree-read", _torchs_names)
