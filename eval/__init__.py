"""Evaluation: judges, win-rate, KL, perplexity, reward-model metrics, the report."""
