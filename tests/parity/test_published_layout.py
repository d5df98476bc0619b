"""A model in the published layout against its definition, written out once more in float64.

transformers has no such model: its own `minimax` turns all dimensions of a softmax head. The
reference reads the published names itself and follows PAPER sec. 1 token by token.

Shapes: T tokens, H query heads, KV key-value heads, D head dim.
"""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from m1.model.hf import load_hf

CONFIG = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "attn_type_list": [0, 1, 0, 1],
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rotary_dim": 6,
    "rope_theta": 300.0,
    "rms_norm_eps": 1e-3,
    "postnorm": True,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_alpha": 1.4,
    "layernorm_full_attention_beta": 0.9,
    "layernorm_linear_attention_alpha": 1.6,
    "layernorm_linear_attention_beta": 0.7,
    "layernorm_mlp_alpha": 1.2,
    "layernorm_mlp_beta": 1.1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def random_tensors(config):
    """Weights under the published names."""
    generator = torch.Generator().manual_seed(0)
    width, inner = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    key_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer, kind in enumerate(config["attn_type_list"]):
        attention = {
            0: {
                "qkv_proj": (3 * inner, width),
                "output_gate": (inner, width),
                "out_proj": (width, inner),
                "norm": (inner,),
            },
            1: {
                "q_proj": (inner, width),
                "k_proj": (key_rows, width),
                "v_proj": (key_rows, width),
                "o_proj": (width, inner),
            },
        }[kind]
        names = {f"self_attn.{name}": shape for name, shape in attention.items()}
        names |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        names["block_sparse_moe.gate"] = (config["num_local_experts"], width)
        for expert in range(config["num_local_experts"]):
            for name in ("w1", "w2", "w3"):
                shape = (config["intermediate_size"], width)
                names[f"block_sparse_moe.experts.{expert}.{name}"] = (
                    shape[::-1] if name == "w2" else shape
                )
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    return {
        name: 0.3 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


class Reference:
    """The published model in float64."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors

    def __call__(self, tokens):
        """Logits [T, V] of tokens [T]."""
        x = self.weight("model.embed_tokens")[tokens]
        for layer, kind in enumerate(self.config["attn_type_list"]):
            at = f"model.layers.{layer}"
            attend = self.softmax if kind else self.lightning
            name = "full_attention" if kind else "linear_attention"
            x = self.add(x, f"{at}.input_layernorm", attend, layer, name)
            x = self.add(x, f"{at}.post_attention_layernorm", self.experts, layer, "mlp")
        x = rms(x, self.weight("model.norm"), self.config["rms_norm_eps"])
        return x @ self.weight("lm_head").T

    def weight(self, name):
        return self.tensors[f"{name}.weight"].double()

    def add(self, x, norm, branch, layer, name):
        alpha, beta = (self.config[f"layernorm_{name}_{part}"] for part in ("alpha", "beta"))
        normed = rms(x, self.weight(norm), self.config["rms_norm_eps"])
        residual = normed if self.config["postnorm"] else x
        return alpha * residual + beta * branch(normed, layer)

    def lightning(self, x, layer):
        at, count = f"model.layers.{layer}.self_attn", self.config["num_attention_heads"]
        fused = silu(x @ self.weight(f"{at}.qkv_proj").T).view(len(x), count, 3, -1)
        outputs = []
        for head in range(count):
            depth = layer / (self.config["num_hidden_layers"] - 1)
            slope = 2 ** (-8 * (head + 1) / count) * (1 - depth + 1e-5)
            state, rows = torch.zeros(2 * fused.shape[-1:], dtype=torch.float64), []
            for q, k, v in fused[:, head]:
                state = math.exp(-slope) * state + torch.outer(k, v)
                rows.append(q @ state)
            outputs.append(torch.stack(rows))
        normed = rms(torch.cat(outputs, dim=-1), self.weight(f"{at}.norm"), 1e-6)
        gate = torch.sigmoid(x @ self.weight(f"{at}.output_gate").T)
        return (gate * normed) @ self.weight(f"{at}.out_proj").T

    def softmax(self, x, layer):
        at, dim = f"model.layers.{layer}.self_attn", self.config["head_dim"]
        q, k, v = ((x @ self.weight(f"{at}.{n}_proj").T).view(len(x), -1, dim) for n in "qkv")
        q, k = self.turn(q), self.turn(k)
        per_key = q.shape[1] // k.shape[1]
        outputs = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // per_key].T / math.sqrt(dim)
            later = torch.ones_like(scores).triu(1).bool()
            weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
            outputs.append(weights @ v[:, head // per_key])
        return torch.cat(outputs, dim=-1) @ self.weight(f"{at}.o_proj").T

    def turn(self, x):
        """Turn the pairs (i, i + rotary_dim / 2), i < rotary_dim / 2, of x [T, heads, D]."""
        x, half = x.clone(), self.config["rotary_dim"] // 2
        for position in range(len(x)):
            for i in range(half):
                angle = position * self.config["rope_theta"] ** (-i / half)
                first, second = x[position, :, i].clone(), x[position, :, i + half].clone()
                x[position, :, i] = first * math.cos(angle) - second * math.sin(angle)
                x[position, :, i + half] = second * math.cos(angle) + first * math.sin(angle)
        return x

    def experts(self, x, layer):
        at = f"model.layers.{layer}.block_sparse_moe"
        chances = (x @ self.weight(f"{at}.gate").T).softmax(dim=-1)
        out = torch.zeros_like(x)
        for t, row in enumerate(x):
            best = chances[t].argsort(descending=True)[: self.config["num_experts_per_tok"]]
            for expert in best:
                w1, w2, w3 = (self.weight(f"{at}.experts.{expert}.w{n}") for n in (1, 2, 3))
                weight = chances[t, expert] / chances[t, best].sum()
                out[t] += weight * (w2 @ (silu(w1 @ row) * (w3 @ row)))
        return out


def silu(x):
    return x * torch.sigmoid(x)


def rms(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_dim": 10},
        {"rotary_dim": 2, "attn_type_list": [1, 1, 1, 1]},
        {"postnorm": False},
        {"attn_type_list": [0, 0, 0, 0], "num_attention_heads": 2},
    ],
    ids=["6 of 10 turned", "all turned", "2 of 10, all softmax", "pre-norm", "all lightning"],
)
def test_logits_follow_the_definition(tmp_path, changes):
    config = {**CONFIG, **changes}
    tensors = random_tensors(config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = load_hf(tmp_path)(tokens[None])[0]
    expected = Reference(config, tensors)(tokens)
    error = (logits - expected).norm() / expected.norm()
    # Measured: at most 3e-6.
    assert error < 1e-5
