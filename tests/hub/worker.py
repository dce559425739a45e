"""Runs in the client's process: reads snippets from stdin, one JSON line each, and answers on the original stdout."""

import json
import logging
import os
import socket
import sys
import textwrap
import traceback


LOOPBACK = ("127.", "localhost", "::1")
violations = []


def refuse_all_but_loopback():
    """Refuses and records every connection and look-up beyond loopback, as far as Python makes them."""
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def guarded_look_up(host, *args, **kwargs):
        if host is not None and not str(host).startswith(LOOPBACK):
            violations.append(f"look-up of {host}")
            raise OSError(f"not allowed in tests: look-up of {host}")
        return look_up(host, *args, **kwargs)

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            violations.append(f"connection to {address}")
            raise OSError(f"not allowed in tests: connection to {address}")
        return connect(self, address)

    socket.getaddrinfo, socket.socket.connect = guarded_look_up, guarded_connect


def call(code, values):
    names = ", ".join(values)
    scope = {"__name__": "client"}
    exec(f"def snippet({names}):\n{textwrap.indent(textwrap.dedent(code), '    ')}\n", scope)
    result = scope["snippet"](**values)
    json.dumps(result)
    return result


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes where the log is
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    refuse_all_but_loopback()
    if os.environ.get("NO_PARQUET_EXPORT", "1") == "1":
        import datasets

        datasets.config.USE_PARQUET_EXPORT = False  # else it asks another host; there is no variable for it
    for line in sys.stdin:
        try:
            answer = {"value": call(**json.loads(line))}
        except BaseException as error:
            text = traceback.format_exc()
            sys.stderr.write(text)
            answer = {"error": {"kind": type(error).__name__, "message": str(error), "traceback": text}}
        if violations:
            answer = {"error": {"kind": "Violation", "message": "; ".join(violations), "traceback": ""}}
        sys.stderr.flush()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
