"""The parts of a preparation: what becomes of a record, where, and which records stay; writing the result."""
