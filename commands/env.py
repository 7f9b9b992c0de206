"""`dataflex env`"""

from __future__ import annotations

from dataflex.commands import session as s

EXAMPLE = "Example: dataflex env --json"


def env(
    dry_run: s.DryRun = False, as_json: s.Json = False, quiet: s.Quiet = False, overwrite: s.Overwrite = False
) -> None:
    """Print versions, devices and memory, for a report of a fault."""
    with s.session(None, {}, as_json=as_json, quiet=quiet) as session:
        from dataflex.machine import machine

        found = machine()
        lines = [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in found.items()]
        session.console.result(lines, {"command": "env", **found})


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or 'not installed'}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)
