"""Standard benchmarks: lm-eval's tasks, asked of every policy on the one base that is loaded."""
