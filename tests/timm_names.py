"""A pytest plugin that points timm's own model tests at our names.

timm's tests choose their models by calling `timm.list_models` with filters that know only timm's families. Here our
names answer in the place of the ViTs they are: `dseq_jepa_vit_b16` where a filter asks for `vit_*`, the module
`dseq_jepa` where it asks for `vision_transformer`.
"""

from fnmatch import fnmatch

import timm

import timm_dseq  # noqa: F401  registers the names

_list_models = timm.list_models


def _patterns(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _list_ours(
    filter="", module=None, pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None
):  # timm's own signature
    names = _list_models("dseq_jepa_*", pretrained=pretrained, include_tags=include_tags)

    def matches(name: str, patterns: str | list[str]) -> bool:
        return any(fnmatch(name.removeprefix("dseq_jepa_"), pattern) for pattern in _patterns(patterns) if pattern)

    if module and "vision_transformer" not in _patterns(module):
        return []
    return [name for name in names if (not filter or matches(name, filter)) and not matches(name, exclude_filters)]


timm.list_models = _list_ours
