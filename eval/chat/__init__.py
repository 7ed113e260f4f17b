"""Talking with a run's policies, and people's votes on their replies."""
