"""GGUF files, the format of llama.cpp: header, config, tokenizer and tensors of a model in one file."""
