"""Files for other runtimes, made from a checkpoint: GGUF for llama.cpp and what is built on it."""
