"""Tiny models gain nothing from threads, and two test workers with two threads each lose a lot."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
