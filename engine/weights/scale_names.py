"""`scale_names`: the one name of the scales of an 8-bit KV cache, which checkpoints spell in several ways.

The standard names are `k_scale` and `v_scale` of the attention module (compressed-tensors). ModelOpt writes `k_scale`
of the key projection, others `output_scale` of it, and old checkpoints have one `kv_scale` for both.
"""

from __future__ import annotations

__all__ = ["scale_names"]

_MODULES = {
    "k_scale": ("k_proj.k_scale", "k_proj.output_scale", "qkv_proj.k_scale", "attn.k_scale"),
    "v_scale": ("v_proj.v_scale", "v_proj.output_scale", "qkv_proj.v_scale", "attn.v_scale"),
}
_SPELLINGS: dict[str, tuple[str, ...]] = {
    f".{spelling}": (name,) for name, spellings in _MODULES.items() for spelling in spellings
}
_SPELLINGS |= dict.fromkeys((".attn.kv_scale", ".kv_scale"), ("k_scale", "v_scale"))


def scale_names(name: str) -> tuple[str, ...]:
    """Returns the standard names of a checkpoint's tensor: two for a scale of keys and values, else one.

    Args:
        name: The checkpoint's name. The name of a tensor that is not a scale of a KV cache is returned as it is.
    """
    for spelling, leaves in _SPELLINGS.items():
        if name.endswith(spelling):
            return tuple(f"{name.removesuffix(spelling)}.{leaf}" for leaf in leaves)
    return (name,)
