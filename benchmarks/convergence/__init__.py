"""Does it train better? The same tuning for every optimizer, paired seeds, and problems made to break masks.

    make science                                         # short runs of small models
    make science-long                                    # all of it, up to 16 times the steps and the parameters
    python -m benchmarks.convergence --long --status     # what is done, what is left
    python -m benchmarks.convergence --long --report --fill     # the tables, into docs/results.md too
    python -m benchmarks.convergence --large --workers 1 --minutes 9     # some more runs of 22M to 135M, on a GPU

``tasks.py``, ``text.py`` and ``counterexamples.py`` say what is trained, ``variants.py`` with what, ``protocol.py`` in
which order, ``search.py`` how it is tuned, ``runs.py`` how one run goes, ``runner.py`` where its result is kept,
``analysis.py`` and ``report.py`` what is made of it.
"""
