"""The distribution that dataflex is installed from, and the other project that has the import name `dataflex` too.

Read from the metadata of what is installed: no project is imported, and a look-up takes about a millisecond.
"""

from __future__ import annotations

from importlib.metadata import distributions, version

NAME = "dataflex-less"
NAMESAKE = "dataflex"  # on the package index: OpenDCAI's DataFlex
NAMESAKE_HOME = "github.com/OpenDCAI/DataFlex"


def own_version() -> str:
    """The version of the installed dataflex; pyproject.toml has the number."""
    return version(NAME)


def namesake_version() -> str | None:
    """The version of OpenDCAI's DataFlex where this environment holds it as well, otherwise None."""
    for found in distributions(name=NAMESAKE):  # what an earlier checkout of dataflex left has this name as well
        if any(NAMESAKE_HOME in home for home in found.metadata.get_all("Project-URL") or []):
            return found.version
    return None


def namesake_notice() -> str | None:
    """What to tell the user where OpenDCAI's DataFlex shares this environment, and the way out; otherwise None."""
    found = namesake_version()
    if found is None:
        return None
    return (
        f"OpenDCAI's DataFlex {found} is installed in this environment too. Both projects are imported as `dataflex`, "
        f"and files of one may have replaced files of the other. To keep {NAME}: pip uninstall {NAMESAKE} {NAME}, "
        f"then install {NAME} again. To keep both: give each an environment of its own."
    )
