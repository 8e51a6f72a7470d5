"""Random generators named by what they are for, so that no draw depends on order, worker or global state."""

import hashlib
import json

import numpy as np


def keyed_generator(*key: str | int) -> np.random.Generator:
    """A generator that is a function of `key` alone, the same in every process.

    Args:
        key: What the draws are for, such as `("cells", seed, slide_id)`. Text and numbers are told apart
            and lengths cannot run into each other: the key is hashed as JSON.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
