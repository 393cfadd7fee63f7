"""What the scripts in `launch/` share. It is not in the wheel: Python finds it beside the script that it starts.

`run.py` has the options of every recipe, its command line, and one run from start to report. `instructions.py` and
`glue.py` prepare data, `models.py` makes a GPT-2 or adds LoRA adapters, and `answers.py` shows what a model answers
before and after. What `alphaadam train` needs too is in `alphaadam_dist/training/`.
"""
