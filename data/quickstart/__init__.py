"""The shipped quickstart data: a shop's support assistant, and the seeded generator that composed it."""
