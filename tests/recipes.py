"""Small recipes for tests: a text of 40 documents and models that train in seconds on one core."""

import json
import random

import yaml

WORDS = ("the", "expert", "router", "takes", "each", "token", "to", "four", "of", "sixteen", "and", "sums")
# What makes each named config smaller still.
SMALL = {
    "tiny-qwen3-moe": {"hidden_size": 32, "head_dim": 8, "moe_intermediate_size": 16, "num_hidden_layers": 2},
    "tiny-mixtral": {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2},
    "tiny-deepseek-v3": {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2},
}


def write_texts(folder, documents=40, seed=0):
    """A JSONL file of short documents; the same for the same arguments."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(documents)]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def settings(folder, config="tiny-qwen3-moe", **training):
    """Settings of a small run in `folder`, as a recipe's YAML holds them."""
    return {
        "model": {"config": config, "overrides": dict(SMALL[config])},
        "data": {"files": str(write_texts(folder)), "max_length": 64},
        "training": {"steps": 10, "batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1} | training,
        "output_dir": str(folder / "run"),
    }


def write_recipe(folder, content, name="recipe.yaml"):
    """The settings as a recipe file."""
    path = folder / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
