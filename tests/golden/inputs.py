"""Inputs of selection.npz, rebuilt by numpy alone; round them to bfloat16 before use."""

import numpy as np

NUM_QUERIES = 96
CASES = {  # name: (seed, keys, decode)
    "prefill_8192": (11, 8192, False),
    "prefill_12345": (12, 12345, False),
    "prefill_20480": (13, 20480, False),
    "decode_16001": (14, 16001, True),
    "decode_9999": (15, 9999, True),
}


def inputs(seed: int, num_keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [num_keys, 2, 128], sampled query positions [queries], their queries [queries, 32, 128]."""
    g = np.random.default_rng(seed)
    topics = g.standard_normal((48, 128)).astype(np.float32)
    block_topic = g.integers(0, 48, (-(-num_keys // 64), 2))
    topic_of_token = np.repeat(block_topic, 64, axis=0)[:num_keys]
    noise = g.standard_normal((num_keys, 2, 128)).astype(np.float32)
    keys = 0.6 * noise + 0.5 * topics[topic_of_token]
    fixed = np.array([0, 31, 127, 6143, 6144, num_keys - 65, num_keys - 2, num_keys - 1])
    positions = np.unique(np.concatenate([g.integers(0, num_keys, NUM_QUERIES - 8), fixed]))
    query_topic = g.integers(0, 48, (len(positions), 32))
    noise = g.standard_normal((len(positions), 32, 128)).astype(np.float32)
    return keys, positions, 0.8 * noise + 0.5 * topics[query_topic]
