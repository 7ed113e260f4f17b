"""Replies that a server draws: vLLM or SGLang, beside us or on another machine, asked over HTTP."""
