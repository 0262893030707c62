"""A recipe's keys as a plan: what a file or a mapping says, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from ..core.errors import GossamerError, unknown
from .plan import Plan

LISTS = ("targets", "skip")
FRACTIONS = ("density", "sparsity")


def plan_from(held: Mapping[str, object], *, steps: int, batch: int, rate: float) -> Plan:
    """The plan that a recipe's keys ask for.

    Args:
        held: fields of `Plan` by name, or `sparsity` in place of `density`.
        steps, batch, rate: the task's own, where the recipe says nothing.

    Raises:
        UnknownName: no such key; near ones are listed.
        GossamerError: a value of another kind, or density and sparsity at once.
    """
    known = {f.name: f for f in fields(Plan)}
    for key in held:
        if key not in known and key != "sparsity":
            raise unknown("recipe key", key, [*known, "sparsity"])
    usual = {"steps": steps, "batch": batch, "rate": rate}
    given = {**usual, **{k: _checked(k, v, known) for k, v in held.items()}}
    if "sparsity" in given:
        if "density" in given:
            raise GossamerError("density and sparsity say the same thing; give one of the two")
        given["density"] = 1.0 - given.pop("sparsity")  # type: ignore[operator]
    return Plan(**given)  # type: ignore[arg-type]


def _checked(key: str, value: object, known: dict) -> object:
    """Of the kind that the plan's default, or the field's own type, has."""
    if key in LISTS:
        return tuple(_of(key, v, str, "text") for v in ([value] if isinstance(value, str) else value))  # type: ignore
    if key in FRACTIONS or key in ("rate", "decay"):
        # YAML 1.1 reads 1e-3, without a point, as text.
        number = _float(value) if isinstance(value, str) else value
        return float(_of(key, number, (int, float), "a number"))  # type: ignore[arg-type]
    if key == "allocation":
        return _of(key, value, (str, dict), "a rule's name, or a density per layer")
    if key == "options":
        return _of(key, value, dict, "a mapping")
    kind = int if known[key].type == "int" else str
    return _of(key, value, kind, "a whole number" if kind is int else "text")


def _float(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _of(key: str, value: object, kind: type | tuple[type, ...], wanted: str) -> object:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GossamerError(f"recipe key {key!r} needs {wanted}, got {value!r}")
    return value
