"""Refuse models whose rotary embedding the installed transformers would read wrongly."""

from importlib.metadata import version
from typing import Any

from common.errors import UserError


def check_rope(name: str, config: dict[str, Any]) -> None:
    """Raise UserError if `config` has its rotary embedding only in a form that the installed transformers ignores.

    transformers 5 writes "rope_parameters" in place of "rope_theta" and "rope_scaling". Version 4 then falls back to
    its defaults, in silence, and vLLM 0.23 follows it: a model trained with a theta of 1,000,000 would run with 10,000.
    """
    parameters = config.get("rope_parameters")
    if int(version("transformers").partition(".")[0]) >= 5 or not isinstance(parameters, dict):
        return
    wanted = {"rope_theta": parameters.get("rope_theta")}
    if parameters.get("rope_type", "default") != "default":
        wanted["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    for key, value in wanted.items():
        if value is not None and config.get(key) != value:
            raise UserError(
                f"{name}: transformers 5 wrote its config.json, and version 4 ignores rope_parameters; "
                f'add "{key}": {value} to a copy of it'.replace("'", '"')
            )
