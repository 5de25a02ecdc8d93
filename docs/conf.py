"""The documentation: ``make docs``."""

import fusedrnn

project = "fusedrnn"
author = "the fusedrnn authors"
project_copyright = "the fusedrnn authors"
version = release = fusedrnn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "fusedrnn"

napoleon_custom_sections = [("Call with", "params_style")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True}
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
add_module_names = False
# Blocks in the pages are marked as doctests; those in docstrings are not all whole programs.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import warnings
import torch
import fusedrnn
_ = torch.manual_seed(0)
"""
