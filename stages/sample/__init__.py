"""Replies of a policy, scored, as rows that a later stage trains on."""
