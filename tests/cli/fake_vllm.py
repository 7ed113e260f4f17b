"""Stands for the interpreter of an environment with vLLM: notes how it was started, and says that it is well.

    FAKE -m vllm.entrypoints.openai.api_server --port N ...

Where FAKE_VLLM_ENDS holds an exit code, it ends with it before it answers.
"""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Well(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def main() -> None:
    # as vLLM's engine, which is a process of its own
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen = {"argv": sys.argv[1:], "environment": dict(os.environ), "pids": [os.getpid(), worker.pid]}
    Path(os.environ["FAKE_VLLM_NOTES"]).write_text(json.dumps(seen))
    if code := os.environ.get("FAKE_VLLM_ENDS"):
        print("ValueError: no room for the keys and values", flush=True)
        sys.exit(int(code))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    HTTPServer(("127.0.0.1", port), Well).serve_forever()


if __name__ == "__main__":
    main()
