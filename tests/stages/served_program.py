"""The stand-in of `served.py` as a program with vLLM's options: what `rollout: {command: ...}` starts.

It notes each start in the file that SERVED_NOTES names. With SERVED_DIES=N its first start ends after N completions.
"""

import json
import os
import runpy
import sys
import threading
from pathlib import Path

made = runpy.run_path(str(Path(__file__).with_name("served.py")))
words = sys.argv[1:]
options = {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
notes = Path(os.environ["SERVED_NOTES"])
first = not notes.exists()
with notes.open("a") as file:
    file.write(json.dumps({"options": options, "argv": words, "pid": os.getpid()}) + "\n")
server = made["Served"](Path(options["--model"]), longest=int(options["--max-model-len"]), processed=True)
server.port = int(options["--port"])
if first and (dies := os.environ.get("SERVED_DIES")):
    server.faults.dies_after = int(dies)
    server.die = lambda: os._exit(7)
server.start()
print("serves", flush=True)
threading.Event().wait()
