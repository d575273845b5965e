"""Training: validated recipes over TRL's SFTTrainer, a resume that loses nothing, and the demo.

from fastexperts.train.recipe import load_recipe
from fastexperts.train.sft import train

train(load_recipe("recipe.yaml"))
"""
