"""Proximal policy optimisation on adapters: `trainer.py` first, it reads from top to bottom."""
