"""How many tokens the parts of a text take: a choice is allowed only where the rest still fits."""

END_COST = 1
"""The line end that ends the text."""

_COORDINATE = 6  # 0.0000
_OCCUPANCY = 3  # 1.0

Z_COST = _COORDINATE + 1 + _OCCUPANCY + 1
Y_COST = _COORDINATE + 1 + Z_COST
X_COST = _COORDINATE + 1 + Y_COST
"""From a coordinate to the end of its row."""

MULTIPLICITY_COST = 1 + X_COST
"""From a site's multiplicity to the end of its row, but for the multiplicity's digits."""

ROW_COST = 4 + MULTIPLICITY_COST
"""Of a site's row but for the digits of its label and its multiplicity."""

FIELD_MARGIN = 32
"""With less room than this behind a field it takes the shortest way to its end: a row of properties has 27."""

MAX_COUNT_DIGITS = 3
# What an element of the data line costs in all fields and one site's row, with labels and multiplicities of three
# digits, by itself, by each digit of its count, and by each site.
ELEMENT_COST = 23 + 1 + 2
COUNT_DIGIT_COST = 2
SITE_COST = ROW_COST + 3 + 3

# P6mm has sites of 1, 2, 3, 6 and 12, any number of each: so many hold what is left over of twelve.
SITES_OF_REST = (0, 1, 1, 1, 2, 2, 1, 2, 2, 2, 3, 3)


def label_digits(first: int, sites: int) -> int:
    """Digits of the labels of so many sites from one on."""
    after = first + sites
    return sites + max(0, after - max(first, 10)) + max(0, after - max(first, 100))


def sites_cost(sites: int, most_digits: int) -> int:
    """Tokens of a whole table of so many sites and of the end of the text, at most."""
    return sites * (ROW_COST + most_digits) + label_digits(0, sites) + END_COST
