"""Hugging Face integration: the experts-interface adapter."""
