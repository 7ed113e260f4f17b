"""The names under which a row's fields are looked for: ours first, which wins, then those that others use."""

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")
COMPLETION_NAMES = ("completion", "response", "output", "answer")
CONVERSATION_NAMES = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt")
