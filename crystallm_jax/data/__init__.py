"""From what a user has on disk to tokens: readers, preparation, the token store and the feeding pipeline.

`prepare` is imported from its module, `crystallm_jax.data.prepare`, since it needs pymatgen.
"""

from crystallm_jax.data.readers import read_records
from crystallm_jax.data.record import Record
from crystallm_jax.data.store import SplitHeader, StoreHeader, TokenStore

__all__ = ["Record", "SplitHeader", "StoreHeader", "TokenStore", "read_records"]
