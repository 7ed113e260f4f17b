"""What `import preftune` gives besides its trainers: the chain, its stages and its measurements, called from Python."""
