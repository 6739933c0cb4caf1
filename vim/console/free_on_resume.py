"""Configuration fields that a resumed run may change, because results do not depend on them."""

from dataclasses import fields

from .config_parser import section_of

# Metadata of such a field: field(default=4, metadata=FREE_ON_RESUME). On a section it frees all fields of the section.
FREE_ON_RESUME = {"free_on_resume": True}


def free_keys(config_class: type, prefix: str = "", free: bool = False) -> set[str]:
    """The keys of free fields, dotted: data.root.

    Args:
        free: treat every field as free.
    """
    keys: set[str] = set()
    for f in fields(config_class):
        is_free = free or f.metadata.get("free_on_resume", False)
        if section := section_of(f):
            keys |= free_keys(section, f"{prefix}{f.name}.", is_free)
        elif is_free:
            keys.add(prefix + f.name)
    return keys
