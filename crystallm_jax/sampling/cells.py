"""How many formula units fill a cell whose text still fits a model's context."""

from collections.abc import Mapping

from crystallm_jax.cif import SPACEGROUPS, find_spacegroup, make_prompt
from crystallm_jax.cif.formula import cell_formula, parse_formula, reduced_formula
from crystallm_jax.cif.occupations import compatible_spacegroups, least_sites
from crystallm_jax.cif.symmetry import MAX_ATOMS
from crystallm_jax.cif.tokenizer import shared_tokenizer
from crystallm_jax.sampling.prompts import Prompt, cell_counts, composition_prompt, wanted_spacegroups

# What follows the space group, each number as short as it can be.
_SHORTEST_REST = """_cell_length_a   1.0000
_cell_length_b   1.0000
_cell_length_c   1.0000
_cell_angle_alpha   90.0000
_cell_angle_beta   90.0000
_cell_angle_gamma   90.0000
_symmetry_Int_Tables_number   {number}
_chemical_formula_structural   {formula}
_chemical_formula_sum   {sum}
_cell_volume   1.0000
_cell_formula_units_Z   {units}
loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1  'x, y, z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{rows}

"""
_SHORTEST_ROW = "{symbol}  {symbol}0  1  0.0000  0.0000  0.0000  1.0"


def fitting_prompts(
    formula: str, spacegroup: str | None = None, *, block_size: int, most_sites: int
) -> list[Prompt]:
    """A prompt for each number of formula units whose text can fit the context, in each of the space groups.

    A cell counts as fitting where the shortest text of it does (`shortest_length`) and, with a space group, where
    that group's Wyckoff positions can hold it. What the model writes may be longer.

    Args:
        formula: a formula unit.
        spacegroup: a symbol or number, several separated by commas, or `compatible`.
        block_size: of the context, in tokens.
        most_sites: atoms of the largest cell; beyond 2,000 none is looked at.

    Returns:
        The smallest cells first; nothing where none fits.

    Raises:
        CIFError: a formula or space group that the vocabulary cannot express.
        SamplingError: a space group named twice.
    """
    counts = parse_formula(formula)
    prompts = []
    for units in range(1, min(most_sites, MAX_ATOMS) // sum(counts.values()) + 1):
        cell = cell_counts(counts, units)
        for group in wanted_spacegroups(cell, spacegroup):
            shortest = shortest_length(cell, None if group is None else find_spacegroup(group))
            if shortest is not None and shortest <= block_size:
                prompts.append(composition_prompt(cell_formula(cell), group))
    return prompts


def shortest_length(counts: Mapping[str, int], spacegroup: str | None = None) -> int | None:
    """Tokens of the shortest text of a cell; no text of it is shorter.

    That is the prompt with the space group, the lines that follow with numbers of the fewest digits, and a row for
    each of the fewest sites that hold the atoms.

    Args:
        counts: of the cell.
        spacegroup: its symbol; None takes the one with the fewest sites.

    Returns:
        None where the space group's sites cannot hold the cell.
    """
    symbols = compatible_spacegroups(counts) if spacegroup is None else (spacegroup,)
    sites = min(
        (n for n in (least_sites(counts, symbol) for symbol in symbols) if n is not None), default=None
    )
    if sites is None:
        return None
    formula, units = reduced_formula(counts)
    sum_formula = cell_formula(counts, separator=" ")
    # Every element is one token, so any will do for the rows.
    text = make_prompt(cell_formula(counts), spacegroup or "P1") + _SHORTEST_REST.format(
        number=SPACEGROUPS[spacegroup or "P1"],
        formula=formula,
        sum=f"'{sum_formula}'" if len(counts) > 1 else sum_formula,
        units=int(units),
        rows="\n".join([_SHORTEST_ROW.format(symbol=next(iter(counts)))] * sites),
    )
    return len(shared_tokenizer().encode_cif(text))
