"""The names of fields that are recognised: our own first, which takes precedence, then those that others use."""

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")
COMPLETION_NAMES = ("completion", "response", "output", "answer")
CONVERSATION_NAMES = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt")
