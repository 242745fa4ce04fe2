"""Optimizers from config values: schedule, clipping, AdamW with a decay mask, and parts frozen by
rule.

Frozen parameters are taken out of the tree before differentiation: they have no gradient, no
optimizer state and no share in the clipped norm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from echo_jax import ranges

PyTree = Any
Rules = Sequence[tuple[str, str]]

LABELS = ("train", "freeze")
UNDECAYED = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Config values of the optimizer.

    Attributes:
        learning_rate: the peak.
        schedule: name in SCHEDULES.
        warmup_fraction: share of the total updates over which the rate rises linearly from 0.
        final_fraction: what the cosine and linear schedules end at, as a share of the peak.
        b1, b2, eps, weight_decay: of AdamW.
        clip_norm: largest global gradient norm; 0 turns clipping off.

    Raises:
        ValueError: an unknown schedule or a number out of its range; the message names the field.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"config.optimizer.schedule={self.schedule!r} must be one of {', '.join(sorted(SCHEDULES))}"
            )
        for name, allowed in _RANGES.items():
            ranges.check(f"config.optimizer.{name}", getattr(self, name), allowed)


_RANGES = {
    "learning_rate": ranges.NOT_NEGATIVE,
    "warmup_fraction": ranges.SHARE,
    "final_fraction": ranges.SHARE,
    "b1": ranges.SHARE_BELOW_ONE,
    "b2": ranges.SHARE_BELOW_ONE,
    "eps": ranges.NOT_NEGATIVE,
    "weight_decay": ranges.NOT_NEGATIVE,
    "clip_norm": ranges.NOT_NEGATIVE,
}

Decay = Callable[[float, int, float], optax.Schedule]

# name -> (peak, number of updates, final rate) -> what follows the warm-up.
SCHEDULES: dict[str, Decay] = {
    "constant": lambda peak, updates, final: optax.constant_schedule(peak),
    "cosine": lambda peak, updates, final: optax.cosine_decay_schedule(
        peak, updates, alpha=final / peak if peak else 0.0
    ),
    "linear": lambda peak, updates, final: optax.linear_schedule(peak, final, updates),
}


def make_schedule(options: OptimizerOptions, total_updates: int) -> optax.Schedule:
    """Update count -> learning rate: linear warm-up over a fraction of the updates, then the named
    schedule to the end.

    Raises:
        ValueError: no updates.
    """
    if total_updates < 1:
        raise ValueError(
            f"the schedule needs at least 1 update, not {total_updates}; raise the number of steps"
        )
    warmup = round(options.warmup_fraction * total_updates)
    final = options.final_fraction * options.learning_rate
    decay = SCHEDULES[options.schedule](
        options.learning_rate, max(total_updates - warmup, 1), final
    )
    if not warmup:
        return decay
    # The first update already moves: a rate of exactly 0 would waste a batch.
    rise = optax.linear_schedule(
        options.learning_rate / warmup, options.learning_rate, max(warmup - 1, 1)
    )
    return optax.join_schedules([rise, decay], [warmup])


def parameter_names(params: PyTree) -> PyTree:
    """The same tree with every leaf replaced by its slash-separated path, e.g.
    ``language_model/layers/q/kernel``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )


def check_rules(rules: Rules) -> None:
    """Checks the freezing rules on their own, before there are parameters.

    Raises:
        ValueError: a rule is no pair of a regular expression and one of LABELS; the message shows it.
    """
    for rule in rules:
        if not isinstance(rule, tuple | list) or [type(part) for part in rule] != [str, str]:
            raise ValueError(
                f"config.parameter_rules holds {rule!r}; give pairs such as ('audio_tower/.*', 'freeze')"
            )
        pattern, label = rule
        if label not in LABELS:
            raise ValueError(
                f"config.parameter_rules: {pattern!r} has label {label!r}; it must be one of {', '.join(LABELS)}"
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(
                f"config.parameter_rules: {pattern!r} is not a regular expression: {error}"
            ) from error


def label_parameters(params: PyTree, rules: Rules) -> PyTree:
    """A tree of ``train`` or ``freeze``: the label of the one rule whose pattern matches the whole
    name of each parameter.

    Args:
        params: any tree of arrays or array specs.
        rules: (regular expression, label) pairs; the expression must match the full name.

    Raises:
        ValueError: a rule that `check_rules` refuses, a parameter that no rule or more than one
        rule matches, or a rule that matches nothing.
    """
    check_rules(rules)
    used: set[str] = set()

    def label_of(name: str) -> str:
        matching = [(pattern, label) for pattern, label in rules if re.fullmatch(pattern, name)]
        if len(matching) != 1:
            matched = ", ".join(pattern for pattern, _ in matching) or "none"
            raise ValueError(
                f"parameter {name} must match exactly one freezing rule, but matches {matched}"
            )
        used.add(matching[0][0])
        return matching[0][1]

    labels = jax.tree.map(label_of, parameter_names(params))
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ValueError(f"freezing rule {unused[0]!r} matches no parameter; correct or remove it")
    return labels


def split(params: PyTree, labels: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, frozen): the same tree twice, with None (an empty subtree) where a leaf belongs
    to the other."""
    trainable = jax.tree.map(lambda leaf, label: leaf if label == "train" else None, params, labels)
    frozen = jax.tree.map(lambda leaf, label: leaf if label == "freeze" else None, params, labels)
    return trainable, frozen


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay acts on: everything but biases and normalization
    scales."""
    return jax.tree.map(
        lambda name: name.rsplit("/", 1)[-1] not in UNDECAYED, parameter_names(params)
    )


def state_shardings(
    optimizer: optax.GradientTransformation, trainable: PyTree, shardings: PyTree, other: Any
) -> PyTree:
    """Shardings of the optimizer's state: what there is for each parameter lies where the parameter does.

    Args:
        optimizer: of `make_optimizer`.
        trainable: its parameters; arrays or `jax.ShapeDtypeStruct`.
        shardings: the same tree, of shardings.
        other: the sharding of counters.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: other,
    )


def make_optimizer(options: OptimizerOptions, total_updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with the schedule and the decay mask; acts on the trainable
    part of `split`."""
    adamw = optax.adamw(
        make_schedule(options, total_updates),
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        mask=decay_mask,
    )
    if not options.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)
