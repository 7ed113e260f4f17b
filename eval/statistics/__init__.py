"""Statistics of the evaluation: pure functions of numbers."""
