"""Compiling for accelerators that are not at hand, and reading what the compiler made."""
