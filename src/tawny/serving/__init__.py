"""The OpenAI-compatible server over the decoder: protocol, guard, answers, chat page. Needs the extra `serve`."""
