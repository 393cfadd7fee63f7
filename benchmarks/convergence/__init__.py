"""Does it train better? The same tuning budget for every optimizer, paired seeds, and problems made to break masks.

    make science                                            # small models, two cores, under 30 minutes
    python -m benchmarks.convergence --large --device cuda  # GPT-2 124M, SmolLM2-135M and others of that size

``tasks.py`` and ``counterexamples.py`` say what is trained, ``variants.py`` with what, ``protocol.py`` in which rounds,
``runs.py`` how one run goes and where its result is kept, ``analysis.py`` and ``report.py`` what is made of it.
"""
