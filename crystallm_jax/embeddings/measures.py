"""Figures that say whether the vectors are ordered as the tokens are."""

from collections.abc import Mapping

import numpy as np

from crystallm_jax.embeddings.classes import facts_of
from crystallm_jax.embeddings.neighbours import agreement, spearman, unit_rows
from crystallm_jax.embeddings.projection import pca
from crystallm_jax.embeddings.vectors import EmbeddingTable, drawn_kind


def measures(table: EmbeddingTable) -> Mapping[str, float]:
    """Figures of a kind that is drawn, by name.

    Digits: `component_1_order`, the size of the rank correlation of the first principal component with the digit,
    and `distance_order`, the rank correlation of the cosine distance of two digits with their difference. Elements and
    space groups: the share of tokens whose nearest neighbour is of the same block, group or crystal system, and that
    share by chance, `same_block` and `same_block_by_chance` and so on.
    """
    kind = drawn_kind(table)
    if kind == "digit":
        return _digit_order(table)
    facts = [facts_of(token, kind) for token in table.tokens]
    names = [fact.class_name for fact in facts]
    if kind == "atom":
        classes = {"block": names, "group": [fact.family for fact in facts]}
    else:
        classes = {"crystal_system": names}
    found: dict[str, float] = {}
    for name, values in classes.items():
        found[f"same_{name}"], found[f"same_{name}_by_chance"] = agreement(table, values)
    return found


def sentences(figures: Mapping[str, float]) -> list[str]:
    """What the figures say, for people."""
    lines = []
    for name, value in figures.items():
        chance = figures.get(f"{name}_by_chance")
        if chance is not None:
            own = name.removeprefix("same_").replace("_", " ")
            lines.append(
                f"nearest neighbour by cosine of the same {own}: {value:.1%} of the tokens (by chance {chance:.1%})"
            )
    if "component_1_order" in figures:
        lines.append(
            f"rank correlation of component 1 with the digit: {figures['component_1_order']:.2f} in size"
        )
    if "distance_order" in figures:
        lines.append(f"rank correlation of cosine distance with difference: {figures['distance_order']:.2f}")
    return lines


def _digit_order(table: EmbeddingTable) -> Mapping[str, float]:
    digits = np.array([int(token) for token in table.tokens])
    units = unit_rows(table.vectors)
    upper = np.triu_indices(len(digits), 1)
    apart = np.abs(digits[:, None] - digits)[upper]
    return {
        "component_1_order": abs(spearman(pca(table.vectors).points[:, 0], digits)),
        "distance_order": spearman((1 - units @ units.T)[upper], apart),
    }
