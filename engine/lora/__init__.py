"""LoRA adapters: small updates of a model's matrices, of which each request of a batch may name another one.

An adapter is read from a folder in PEFT's layout (`read_adapter`), and uploaded to an adapter slot of the model
(`DeviceSlots`). Each linear layer adds the product of a token with the matrices in the slot of the token's adapter to
its own product (`LoraLinear`); nothing is computed for tokens without an adapter.
"""
