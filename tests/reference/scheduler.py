"""What `tawny.decoding.scheduler` promises, the slow obvious way: each request alone, its prompt read at once."""

from __future__ import annotations

import torch

from tawny.decoding.decoder import Decoder


def alone(model, request, capacity, ends):
    """The tokens of one request, and each step's logits `[vocabulary]` in float32."""
    room = capacity - len(request.ids)
    room = room if request.most is None else min(room, request.most)
    made, seen = [], []
    with torch.inference_mode():
        decoder = Decoder(model, capacity, quick=False)
        logits = decoder.prefill(request.ids)
        while len(made) < room:
            seen.append(logits.clone())
            token = request.choose(logits)
            if token in ends:
                break
            made.append(token)
            if len(made) < room:
                logits = decoder.step(token)
    return made, seen
