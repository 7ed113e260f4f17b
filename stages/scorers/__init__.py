"""What gives a reply a score, whoever asks: a stage that trains on it, or a judge that measures with it."""
