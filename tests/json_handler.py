"""JSON in and out of the HTTP servers that tests play; they log nothing."""

import json
from http.server import BaseHTTPRequestHandler


class JsonHandler(BaseHTTPRequestHandler):
    def _raw(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _body(self):
        return json.loads(self._raw())

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
