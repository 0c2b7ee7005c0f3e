"""A model whose code lies in its folder, as `auto_map` in config.json says: the text of its two files."""

from __future__ import annotations

__all__ = ["CONFIGURATION", "MODELING"]

CONFIGURATION = """
from transformers import PretrainedConfig


class WheelConfig(PretrainedConfig):
    model_type = "wheel"

    def __init__(self, vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mixes=0.0, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.mixes = num_attention_heads, mixes
        self.max_position_embeddings = 64
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_wheel import WheelConfig


def eager(module, query, key, value, attention_mask, scaling, **kwargs):
    scores = query @ key.mT * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


class WheelAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, attention_mask, past_key_values):
        shape = (*hidden.shape[:-1], 3, -1, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in self.qkv(hidden).view(shape).unbind(2))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        attended, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.out(attended.flatten(2))


class WheelModel(PreTrainedModel):
    config_class = WheelConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(WheelAttention(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + hidden.shape[1])[None]
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, position_ids)
        hidden = hidden + self.positions(position_ids)
        hidden = hidden + self.config.mixes * hidden.roll(1, 1)
        for layer in self.layers:
            hidden = hidden + layer(hidden, mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class WheelForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = WheelConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = WheelModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, logits_to_keep=0, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             past_key_values=past_key_values, inputs_embeds=inputs_embeds)
        logits = self.lm_head(outputs.last_hidden_state) * 0.7
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
"""
