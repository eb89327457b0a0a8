"""The site: pages and API reference in one, built by `make docs` with Sphinx."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import turnout
from docutils import nodes
from sphinx import addnodes

HERE = Path(__file__).parent

project = "Turnout"
copyright = "the Turnout authors"
release = turnout.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "Turnout"
html_show_sphinx = False
smartquotes = False  # what is copied from a page must be what was written

# Pages are read on GitHub as well: links name files, and headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

# The reference comes from the docstrings. A name in backticks becomes a link where the reference has that name.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!turnout\.).*")]  # torch's names, arguments; a name of ours must exist
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # autodoc shows the attributes of a dataclass already

PACKAGES = [page.stem for page in (HERE / "api").glob("turnout.*.md")]


def places() -> dict[str, str]:
    """The one place where each public class and function is documented, by the place where it is defined."""
    found = {}
    for package in sorted(PACKAGES, key=lambda name: name.count("."), reverse=True):  # the shortest name wins
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            one_of_two = f"{package}.{name}" in PACKAGES  # a function with the name of its module: shown in that
            if (inspect.isclass(value) or inspect.isfunction(value)) and not one_of_two:
                found[f"{value.__module__}.{value.__qualname__}"] = f"{package}.{name}"
    return found


PLACES = places()


def exists(name: str) -> bool:
    """Whether Python finds such a name."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def skip(app, what, name, value, skipped, options):
    """Show a name that several packages export in one of them."""
    place = PLACES.get(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}")
    package = app.env.docname.removeprefix("api/")
    return True if place and place.rpartition(".")[0] != package else None


def keep_whole(app, what, name, value, options, lines):
    """Keep napoleon from taking what is before a colon in a property's docstring for a type."""
    if what in ("property", "attribute"):
        lines.insert(0, "")


def refer(app, doctree):
    """Make a reference of `turnout.x.y` in a page, so that it is a link, and fails where there is no such name."""
    for literal in list(doctree.findall(nodes.literal)):
        name = re.fullmatch(r"(turnout(?:\.\w+)+)(?:\(.*\))?", literal.astext())
        if name and not isinstance(literal.parent, addnodes.pending_xref):
            about = {"refdomain": "py", "reftype": "obj", "reftarget": name[1], "refdoc": app.env.docname}
            literal.replace_self(addnodes.pending_xref("", literal.deepcopy(), refwarn=True, **about))


def resolve(app, env, node, content):
    """Lead from where a name is defined, as annotations have it, to where it is documented, if it is."""
    target = node.get("reftarget", "")
    for source, place in PLACES.items():
        if target == source or target.startswith(f"{source}."):
            name = place + target.removeprefix(source)
            return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
    return content if target.startswith("turnout.") and exists(target) else None


def outside(app, name, source):
    """Let links to Markdown outside docs/ (README, CONTRIBUTING) lead to the file: it is no page here."""
    folder = (HERE / name).parent

    def path(match):
        inside = (folder / match[1]).resolve().is_relative_to(HERE)
        return match[0] if inside else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)", path, source[0])


def setup(app):
    """Connect all of these."""
    app.connect("source-read", outside)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", keep_whole, priority=400)
    app.connect("doctree-read", refer)
    app.connect("missing-reference", resolve)
