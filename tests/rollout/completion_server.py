"""A server process for the tests: vLLM's wire format for completions and LoRA adapters, around a tiny model.

`python completion_server.py MODEL_FOLDER` loads the model, then starts a serving process for each port that it reads
from its standard input (0: any), prints the port, and ends with its input. The serving process really dies when it is
told to; starting the next one takes no import. It is strict where vLLM is lenient (a field
that vLLM does not document is an error), samples with its own few lines, and misbehaves on demand: POST /test/faults
["500", "cut", ...] makes the next completions fail that way, one each; POST /test/cards what /v1/models lists ([]: that
there is no such list); GET /test/log says what was asked for.
"""

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELDS = {
    "model": str, "prompt": list, "max_tokens": int, "temperature": float, "top_p": float, "top_k": int,
    "min_p": float, "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float, "n": int,
    "seed": int, "stop_token_ids": list, "skip_special_tokens": bool, "add_special_tokens": bool, "stream": bool,
    "return_token_ids": bool, "return_tokens_as_token_ids": bool, "logprobs": int,
}  # fmt: skip


REFUSALS = {  # fault: what is said, and headers
    "500": ({"error": {"message": "engine died\nof something", "code": 500}}, {}),
    "429": ({"error": {"message": "busy"}}, {"Retry_After": "0"}),
    "400": ({"error": {"message": "maximum context length is 8 tokens"}}, {}),
    "503": ("starting", {}),
    "422": ({"detail": "prompt must be a string."}, {}),
    "302": ("", {"Location": "http://elsewhere/"}),
}


class State:
    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.folder = folder
        self.models = {"base": AutoModelForCausalLM.from_pretrained(folder).eval()}
        self.faults, self.log, self.lock = [], [], threading.Lock()
        self.paths, self.cards = {}, [{"id": "base", "root": folder, "parent": None, "max_model_len": 4096}]

    def load(self, name, path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.models[name] = PeftModel.from_pretrained(base, path).eval()
        self.paths[name] = path

    def answer(self, body):
        """Token by token, without a cache."""
        import torch

        model = self.models[body["model"]]
        generator = torch.Generator().manual_seed(body["seed"])
        ids, tokens, logprobs = list(body["prompt"]), [], []
        while len(tokens) < body["max_tokens"]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            if body["temperature"] == 0:
                token = int(raw.argmax())
            else:
                token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator))
            ids.append(token)
            tokens.append(token)
            logprobs.append(float(raw[token]))
            if token in body["stop_token_ids"]:
                return tokens, logprobs, "stop"
        return tokens, logprobs, "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state = None

    def log_message(self, *_):
        pass

    def say(self, status, value, **headers):
        raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(raw)

    def fail(self, status, message):
        self.say(status, {"error": {"message": message, "type": "x", "code": status}})

    def do_GET(self):
        if self.path == "/test/log":
            return self.say(200, self.state.log)
        if self.path != "/v1/models" or self.state.cards is None:
            return self.fail(404, "Not Found")
        adapters = [{"id": n, "root": p, "parent": "base", "max_model_len": None} for n, p in self.state.paths.items()]
        return self.say(200, {"object": "list", "data": [*self.state.cards, *adapters]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        if self.path == "/test/faults":
            state.faults[:] = body
            return self.say(200, {})
        if self.path == "/test/cards":
            state.cards = body or None
            return self.say(200, {})
        if self.path == "/v1/load_lora_adapter":
            if set(body) != {"lora_name", "lora_path"}:
                return self.fail(400, f"fields {sorted(body)}")
            with state.lock:
                if body["lora_name"] in state.models:
                    return self.fail(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
                with open(f"{body['lora_path']}/adapter_config.json") as file:
                    rank = json.load(file)["r"]
                if rank > 8:
                    state.log.append(["refused", body["lora_name"]])
                    told = f"Worker failed with error 'LoRA rank {rank} is greater than max_lora_rank 8.', please check"
                    return self.fail(500, f"Call to add_lora method failed: {told} the stack trace above")
                state.load(body["lora_name"], body["lora_path"])
            state.log.append(["load", body["lora_name"]])
            return self.say(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            state.paths.pop(body["lora_name"], None)
            if state.models.pop(body["lora_name"], None) is None:
                return self.fail(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            state.log.append(["unload", body["lora_name"]])
            return self.say(200, "Success")
        if self.path.partition("?")[0] == "/v1/completions":
            return self.completion(body)
        return self.fail(404, "Not Found")

    def completion(self, body):
        state = self.state
        wrong = [n for n, v in body.items() if n not in FIELDS or not isinstance(v, (FIELDS[n], int))]
        if wrong or set(FIELDS) != set(body):
            return self.fail(400, f"fields wrong: {wrong or set(FIELDS) ^ set(body)}")
        with state.lock:
            fault = state.faults.pop(0) if state.faults else None
            state.log.append(["completion", body, fault])
        if body["model"] not in state.models:
            return self.fail(404, f"The model `{body['model']}` does not exist.")
        if fault in REFUSALS:
            value, headers = REFUSALS[fault]
            return self.say(int(fault), value, **headers)
        if fault == "slow":
            time.sleep(30)
        if fault == "die" or not os.path.exists(state.paths.get(body["model"], "/")):  # vLLM reads it again at times
            os._exit(1)
        tokens, logprobs, reason = state.answer(body)
        choice = {
            "index": 0, "text": "".join(f"<{t}>" for t in tokens), "finish_reason": reason,
            "stop_reason": tokens[-1] if reason == "stop" else None, "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {
                "tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs,
                "top_logprobs": [{f"token_id:{t}": v} for t, v in zip(tokens, logprobs)],
                "text_offset": [0] * len(tokens),
            },
        }  # fmt: skip
        reply = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
        change_answer(fault, choice, reply)
        raw = json.dumps(reply).encode()
        if fault == "garbage":
            raw = b"<html>bad gateway</html>"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if fault in ("cut", "reset"):
            self.wfile.write(raw[: len(raw) // 2])
            self.wfile.flush()
            if fault == "reset":  # a reset, not an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            self.connection.close()
            return None
        if fault == "drip":
            for byte in raw:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(raw)
        return None


WRONG_CHOICES = {  # fault: what it changes of a choice
    "text": {"token_ids": None, "logprobs": None},
    "no logprobs": {"logprobs": None},
    "abort": {"finish_reason": "abort"},
    "no stop token": {"finish_reason": "stop", "stop_reason": 256, "token_ids": [5, 6]},
    "other stop": {"finish_reason": "stop", "stop_reason": None, "token_ids": [5, 6]},
    "short": {"finish_reason": "length", "token_ids": [5]},
    "empty": {"token_ids": []},
    "text ids": {"token_ids": ["5", "6"]},
}


def change_answer(fault, choice, reply):
    choice.update(WRONG_CHOICES.get(fault, {}))
    if fault == "old":  # before return_token_ids
        del choice["token_ids"], choice["prompt_token_ids"]
    elif fault == "text tokens":
        choice["token_ids"] = None
        choice["logprobs"]["tokens"] = ["Hel", "lo"]
    elif fault == "bos":
        choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]
    elif fault == "past stop":
        choice.update(finish_reason="length", token_ids=[256, *choice["token_ids"][1:]])
    elif fault == "foreign":
        choice.update(finish_reason="length", token_ids=[100000] * len(choice["token_ids"]))
    elif fault == "no choices":
        del reply["choices"]


def main():
    Handler.state = State(sys.argv[1])
    child = None
    for line in sys.stdin:
        server = ThreadingHTTPServer(("127.0.0.1", int(line)), Handler)
        child = os.fork()
        if child == 0:
            server.serve_forever()
        print(server.server_address[1], flush=True)
        server.socket.close()
    if child:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
