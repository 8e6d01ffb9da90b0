"""Other forms of a factored model."""
