"""How fast llama.cpp decodes many sequences in one batch; serving.py runs it in an environment that has llama-cpp-python.

    python benchmarks/llama_batch.py MODEL.gguf THREADS PROMPT TOKENS MOST

A number of sequences on a line, up to MOST, asks for the tokens a second of so many together, after PROMPT tokens of each.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp


def main(path: str, threads: int, prompt: int, tokens: int, most: int) -> None:
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_seq_max = 1024 * most, 512, most
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(most, 0, 1)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        count = batch.n_tokens = int(line)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begin = 0.0
        for position in range(prompt + tokens):
            if position == prompt:
                begin = time.perf_counter()
            for number in range(count):
                batch.token[number], batch.pos[number] = 300 + position, position
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, number
                batch.logits[number] = 1
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
        print(json.dumps(count * tokens / (time.perf_counter() - begin)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
