"""Print the lowest version of each dependency that pyproject.toml allows, as pip constraints (`make test-min`).

Development tools have no constraints.
"""

import re
import tomllib
from pathlib import Path

BOUND = re.compile(r"(?P<name>[\w-]+)(\[\w+\])?>=(?P<version>[\w.]+)(;.*)?")


def lowest_versions() -> dict[str, str]:
    """Lowest version by package name. Raises ValueError for a dependency with no lower bound or with two."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = [entry for name, group in project["optional-dependencies"].items() if name != "dev" for entry in group]
    lowest: dict[str, str] = {}
    for entry in project["dependencies"] + extras:
        bound = BOUND.fullmatch(entry)
        if bound is None:
            raise ValueError(f"{entry!r} in pyproject.toml has no lower bound of the form name>=version")
        name, version = bound["name"], bound["version"]
        if lowest.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lower bounds in pyproject.toml, {lowest[name]} and {version}")
    return lowest


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest_versions().items()))
