"""Judges: what gives a reply, or a pair of replies, a verdict."""
