"""Names of tensors as older checkpoints call them, and as the model at hand does.

transformers 5 moved modules (`model.layers` became `model.language_model.layers` in many families) and renames the tensors of a whole model
while it loads. An adapter gets the same renaming here, from the same table, so that no family needs one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter


def renaming(model: Any) -> Callable[[str], str]:
    """What gives the name in `model` for a name in a checkpoint of any age; names that no rule knows stay as they are.

    Rules that merge or split tensors have no counterpart for low-rank factors and are left out: such a name stays, and does not fit.
    """
    rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, WeightConverter)]

    def rename(name: str) -> str:
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        return name

    return rename
