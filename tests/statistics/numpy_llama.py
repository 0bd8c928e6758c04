"""A Llama model in float64 NumPy, one sequence at a time, that returns the inputs of its maps."""

import numpy as np


def forward(params, tokens, config):
    """Return the logits [time, vocab], and the input [time, in] of every linear map by path."""
    p = {path: np.asarray(x, np.float64) for path, x in params.items()}
    time, size, inputs = len(tokens), config.head_dim, {}

    def project(path, x):
        inputs[path] = x
        return x @ p[path].T

    def norm(path, x):
        return p[path] * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)

    angles = np.arange(time)[:, None] / config.ropes[0].theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # [time, 1, size / 2]

    def rotate(x):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    hidden = p["embed"][list(tokens)]
    for layer in (f"layers/{i}" for i in range(config.num_layers)):
        x = norm(f"{layer}/input_norm", hidden)
        query, key, value = (
            project(f"{layer}/attn/{name}_proj", x).reshape(time, -1, size) for name in "qkv"
        )
        query, key, out = rotate(query), rotate(key), np.zeros_like(query)
        group = config.num_heads // config.num_kv_heads
        for head in range(config.num_heads):
            scores = query[:, head] @ key[:, head // group].T / np.sqrt(size)
            scores[np.triu_indices(time, 1)] = -np.inf
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = probs / probs.sum(axis=-1, keepdims=True) @ value[:, head // group]
        hidden = hidden + project(f"{layer}/attn/o_proj", out.reshape(time, -1))
        x = norm(f"{layer}/post_attn_norm", hidden)
        gate, up = (project(f"{layer}/mlp/{name}_proj", x) for name in ("gate", "up"))
        hidden = hidden + project(f"{layer}/mlp/down_proj", gate / (1 + np.exp(-gate)) * up)
    return project("lm_head", norm("final_norm", hidden)), inputs


def log_likelihood(params, example, config):
    """Return the log-probability of an example's target given its prompt."""
    tokens = example.prompt + example.target
    logits, _ = forward(params, tokens, config)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    start = len(example.prompt)
    return sum(logprobs[i - 1, tokens[i]] for i in range(start, len(tokens)))
