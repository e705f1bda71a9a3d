"""What `timm-dseq get` shows of its results: a list of what there is, what was removed, or how to load what is here."""

from typing import Any

from .folders import size_text


def shown(result: dict[str, Any] | list[dict[str, Any]]) -> str:
    """The text for a screen of what get, listing or remove has returned."""
    if isinstance(result, list):
        lines = "{name}: {state}\n  from {link}\n  licence: {license}"
        return "\n".join(lines.format(**row, state=row["folder"] or "not here") for row in result)
    if "freed" in result:
        return f"{result['name']}: removed, {size_text(result['freed'])} freed"
    return (
        f"{result['name']} is {'now' if result['new'] else 'already'} in the store: {result['folder']}\n"
        f'load it: import timm_dseq, timm; timm.create_model("{result["name"]}", pretrained=True)\n'
        f'without this package: timm.create_model("local-dir:{result["folder"]}", pretrained=True)'
    )
