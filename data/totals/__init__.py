"""The shipped data with checkable answers: what an order comes to, and the seeded generator that composed it."""
