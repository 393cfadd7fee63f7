"""What other people's tools need to know our optimizers by name: a module for each, imported by that tool alone.

``hf_trainer`` waits for HF's Trainer by itself; the others are named in the tool's own configuration.
"""
