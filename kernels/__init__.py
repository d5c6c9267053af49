"""The numeric work of a step, each kernel beside its eager reference."""
