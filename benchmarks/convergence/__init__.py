"""Does it train better? The same tuning budget for every optimizer, paired seeds, and problems made to break masks.

    make science                                                # small models, two cores, under 30 minutes
    python -m benchmarks.convergence --large --workers 1        # models of 100M parameters on a GPU: days
    python -m benchmarks.convergence --large --workers 1 --task finetune --optimizer C-AdamW --no-controls

``tasks.py`` and ``counterexamples.py`` say what is trained, ``variants.py`` with what, ``protocol.py`` in which rounds,
``runs.py`` how one run goes, ``runner.py`` where its result is kept, ``analysis.py`` and ``report.py`` what is made of
it.
"""
